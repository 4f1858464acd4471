export JAX_COMPILATION_CACHE_DIR=/tmp/k2cache PYTHONUNBUFFERED=1
timeout -k 3 85 python3 k2_job2.py 2>&1 | grep --line-buffered -v -E "^(W|I|E)[0-9]{4}" | tee $OUT/micro2.log
