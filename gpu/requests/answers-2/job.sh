#!/bin/bash
# Recall cells once more, with jax-linear-attention: one seed and three by vmap; old and new code.
HERE=$(cd "$(dirname "$0")" && pwd)
PY=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_COMPILATION_CACHE_DIR=${CACHE:-/tmp/answers_cache}
mkdir -p "$OUT" newtree; cp -r tlinformer_jax configs benchmarks newtree/; cp -r changed/* newtree/
SITE=$PWD/site; ls /tmp/carry | head -20
run() { PYTHONPATH=$1:$SITE:$PYTHONPATH timeout -k 3 ${5:-300} $PY "$HERE/cells.py" $2 $3 $4 2>&1 | grep --line-buffered -v -E "^(W|I|E)[0-9]{4}|absl|Source Location|^external|^$" | cut -c1-400; }
for m in ${MODELS:-delta-4 hybrid-4 tlin-4 attention-4}; do run $PWD/newtree new $m "" & run $PWD old $m "" & sleep 1; done
wait
rm -rf "$OUT"/trace-*
