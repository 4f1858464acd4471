# Training steps of several plans: programs are compiled by AT_ONCE processes that then end, and go to a cache; one
# process loads the programs of a model and length, and times them alternately while it holds the GPU alone.
D=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1 PYTHONPATH=$PYTHONPATH:/tmp/carry:$D
export PY=${PY:-python3} JAX_COMPILATION_CACHE_DIR=${CACHE:-/tmp/pairs_cache} D
show() { grep --line-buffered -E "tokens/s|Error|compiled|agree|DIFFER|miss|wait"; }
N=$($PY -c "import json;print(len(json.load(open('$D/variants.json'))))")
( seq 0 $((N-1)) | xargs -P ${AT_ONCE:-4} -I{} bash -c 'timeout --foreground -k 5 400 $PY $D/steps.py compile {} 2>&1; touch $OUT/compiled.{}' | show ) &
$PY $D/steps.py time 2>&1 | show
wait
rm -f $OUT/compiled.*
