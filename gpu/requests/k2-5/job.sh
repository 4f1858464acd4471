export JAX_COMPILATION_CACHE_DIR=/tmp/k2cache PYTHONUNBUFFERED=1
run() { PYTHONPATH=$1:$PWD timeout -k 3 60 python3 $2/k2_pkg.py $3 $4 2>&1 | grep --line-buffered -v -E "^(W|I|E)[0-9]{4}" | tee -a $OUT/pkg.log; }
run $PWD old old
TABLES=1 run $PWD/new new new
