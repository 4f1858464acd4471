export JAX_COMPILATION_CACHE_DIR=/tmp/slidecache PYTHONUNBUFFERED=1
show() { grep --line-buffered -v -E "^(W|I|E)[0-9]{4}|WARNING"; }
(timeout -k 3 300 python3 slide_timed.py benchmarks.inference --architectures=tlinformer --lengths=1000000 --parts=prefill,sustained,slide --seconds=0.5 --out=$OUT/inference_now 2>&1 | show > $OUT/inference_now.txt) &
timeout -k 3 380 python3 slide_job.py 2>&1 | show
wait
tail -30 $OUT/inference_now.txt
