export JAX_COMPILATION_CACHE_DIR=/tmp/k2cache PYTHONUNBUFFERED=1
DESIGNS="base;all;all, lookup;all, chunks of 65536" PROFILED="base;all" timeout -k 3 105 python3 k2_e2e.py 2>&1 | grep --line-buffered -v -E "^(W|I|E)[0-9]{4}" | tee $OUT/e2e.log
