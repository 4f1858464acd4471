#!/bin/bash
# Recall cells (issues 24, 25): one seed, three seeds by vmap and by lax.map; old and new code; then four cells side by side.
HERE=$(cd "$(dirname "$0")" && pwd)
PY=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_COMPILATION_CACHE_DIR=${CACHE:-/tmp/answers_cache}
mkdir -p "$OUT" newtree; cp -r tlinformer_jax configs benchmarks newtree/; cp -r changed/* newtree/
MODELS="${MODELS:-attention-4 tlin-4 delta-4 hybrid-4}"
run() { PYTHONPATH=$1:$PYTHONPATH timeout -k 3 ${5:-330} $PY "$HERE/cells.py" $2 $3 $4 2>&1 | grep --line-buffered -v -E "^(W|I|E)[0-9]{4}|absl"; }
rm -f "$OUT"/ready-* "$OUT/go"
for m in $MODELS; do run $PWD old $m "" & run $PWD/newtree new $m "" & done
wait
for m in $MODELS; do run $PWD/newtree new $m child 150 & done
( for i in $(seq 90); do [ $(ls "$OUT"/ready-* 2>/dev/null | wc -l) -ge $(echo $MODELS | wc -w) ] && break; sleep 1; done
  $PY - <<'P'
import contextlib, os, sys, time
sys.path.append("/tmp/carry")
try:
    from alone import alone
except ImportError:
    alone = contextlib.nullcontext
with alone():
    open(os.environ["OUT"] + "/go", "w").close()
    time.sleep(6)
P
) &
wait
rm -rf "$OUT"/trace-*
