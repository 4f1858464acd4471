# Dumps the stacks of training processes whose log has not grown for 40 s (cpu job; runs until killed).
chmod +x /tmp/carry/py-spy 2>/dev/null
mkdir -p $OUT
while true; do
  for log in /tmp/q/books-*/log /tmp/q/gap-*/log /tmp/q/rate-*/log /tmp/q/knee-*/log /tmp/q/long-*/log /tmp/q/large-*/log; do
    [ -f $log ] || continue
    n=$(basename $(dirname $log)); age=$(( $(date +%s) - $(stat -c %Y $log) ))
    grep -q "\"$n\": \[" /tmp/q/state.json || continue
    if [ $age -gt 40 ] && [ $(( age % 30 )) -lt 6 ]; then
      for p in $(pgrep -f "tlinformer_jax.commands.sweep"); do
        if grep -qz "^OUT=/tmp/q/$n$" /proc/$p/environ; then { echo "== $n $p age $age"; /tmp/carry/py-spy dump --nonblocking -p $p; cat /proc/$p/status | grep -E "State|Threads"; for t in /proc/$p/task/*; do echo "$(cat $t/comm) $(cat $t/wchan 2>/dev/null)"; done | sort | uniq -c | sort -rn | head -20; } >> $OUT/$n.json 2>&1; fi
      done
    fi
  done
  sleep 5
done
