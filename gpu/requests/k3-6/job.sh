# Attention of windows by Triton kernels without dropout, against cuDNN. About 60 s.
D=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHONPATH=$PYTHONPATH:$D timeout 88 ${PY:-python3} $D/short.py ${TINY:+--tiny}
