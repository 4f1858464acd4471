# warm.sh OUT COMMAND...: runs a sweep command until its training has logged step 50, then kills it: fills the compilation cache
out=$1; shift
setsid bash -c "$*" > $OUT/warm.txt 2>&1 & p=$!
for i in $(seq 240); do sleep 0.5; grep -q "^step 50/" $OUT/warm.txt && break; kill -0 $p 2>/dev/null || break; done
kill -9 -- -$p 2>/dev/null; tail -3 $OUT/warm.txt; true
