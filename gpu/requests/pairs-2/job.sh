# Training steps of several plans of windows: six processes compile side by side, each timing holds the GPU alone.
D=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1 PYTHONPATH=$PYTHONPATH:/tmp/carry:$D
PY=${PY:-python3}
N=$($PY -c "import json;print(len(json.load(open('$D/variants.json'))))")
seq 0 $((N-1)) | xargs -P ${AT_ONCE:-6} -I{} timeout --foreground -k 5 ${LIMIT:-420} $PY $D/steps.py {} $D/variants.json 2>&1 | grep --line-buffered -v -E "^(W|I|E|F)[0-9]{4}"
rm -f $OUT/turn
$PY $D/agree.py
