export JAX_COMPILATION_CACHE_DIR=/tmp/slidecache PYTHONUNBUFFERED=1
show() { grep --line-buffered -v -E "^(W|I|E)[0-9]{4}|WARNING"; }
mkdir -p /tmp/slidefinal; cp slide_final.py /tmp/slidefinal/
rm -f $OUT/compiled_* /tmp/slide_truth_*
CASES="1000000 auto 1050000 auto 100000 auto 1000000 int8"
(timeout -k 3 200 python3 slide_timed.py benchmarks.inference --architectures=tlinformer --lengths=100000,1000000 --parts=prefill,sustained,slide --seconds=0.5 --out=$OUT/inference_final 2>&1 | show > $OUT/inference_final.txt) &
(PYTHONPATH=/tmp/src:${PYTHONPATH#*:} timeout -k 3 280 python3 /tmp/slidefinal/slide_final.py old $CASES 2>&1 | show > $OUT/old.txt) &
timeout -k 3 280 python3 /tmp/slidefinal/slide_final.py new $CASES 2>&1 | show
wait
cat $OUT/old.txt; tail -30 $OUT/inference_final.txt
