export JAX_COMPILATION_CACHE_DIR=/tmp/slidecache PYTHONUNBUFFERED=1
show() { grep --line-buffered -v -E "^(W|I|E)[0-9]{4}|WARNING"; }
timeout -k 3 295 python3 slide_job.py 2>&1 | show
