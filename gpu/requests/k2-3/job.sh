export JAX_COMPILATION_CACHE_DIR=/tmp/k2cache PYTHONUNBUFFERED=1
TOGETHER=4 DESIGNS="base;columns by XLA;columns;columns, add and norm" PROFILED="columns by XLA;columns, add and norm" timeout -k 3 100 python3 k2_e2e.py 2>&1 | grep --line-buffered -v -E "^(W|I|E)[0-9]{4}" | tee $OUT/e2e.log
