export JAX_COMPILATION_CACHE_DIR=/tmp/k2cache PYTHONUNBUFFERED=1
timeout -k 3 95 python3 k2_job.py 2>&1 | grep --line-buffered -v -E "^(W|I|E)[0-9]{4}" | tee $OUT/micro.log
