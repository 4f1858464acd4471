# Training steps at N = 512 with options of XLA, compiled side by side, timed in turn. About 80 s.
D=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export XLA_PYTHON_CLIENT_PREALLOCATE=false
PY=${PY:-python3}
N=$($PY -c "import json;print(len(json.load(open('$D/variants.json'))))")
for i in $(seq 0 $((N-1))); do timeout 100 $PY $D/steps.py $i $D/variants.json & done
wait
rm -f $OUT/ready.* $OUT/done.*
