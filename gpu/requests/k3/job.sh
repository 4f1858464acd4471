# Attention calls of a training step alone. About 40 s.
D=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
timeout 85 ${PY:-python3} $D/attention_calls.py ${TINY:+--tiny}
