# wait.sh SECONDS: waits, prints states and the ends of failed logs, packs records.
end=$((SECONDS+$1))
python3 - $1 <<'P'
import json,sys,time
state=lambda: json.load(open('/tmp/q/state.json'))
end=time.time()+int(sys.argv[1]); last=state()['t']>=1640
while True:
    time.sleep(1)
    try: s=state()
    except ValueError: continue
    if last:
        if s['t']>=1712: break
    elif time.time()>=end: break
P
python3 - <<'P'
import json,pathlib
s=json.load(open('/tmp/q/state.json')); seen=pathlib.Path('/tmp/q/seen'); old=set(seen.read_text().split()) if seen.exists() else set()
print('t',s['t'],'free',s['free'],'held',s['held'],'running',s['running'])
new={n:d for n,d in s['done'].items() if n not in old}
print('done', ' '.join(f"{n}:{d['rc']}:{d['s']}s@{d['gpu']}" for n,d in new.items()))
for n,d in new.items():
    if d['rc']!=0: print('---',n,d['rc']); print(open(f'/tmp/q/{n}/log',errors='replace').read()[-700:])
for n in s['running']:
    t=open(f'/tmp/q/{n}/log',errors='replace').read().strip().splitlines(); print('>',n,t[-1][-160:] if t else '')
seen.write_text(' '.join(s['done']))
P
nvidia-smi --query-gpu=memory.used,utilization.gpu --format=csv,noheader; cat /tmp/q/queue.log | tail -3; uptime
pack() {
rm -rf /tmp/pack; mkdir -p /tmp/pack; cd /tmp/q
for n in *; do [ -d $n ] || continue; mkdir -p /tmp/pack/$n; [ -f $n/log ] && grep -E "accuracy|evaluation|stage|error|Error|done|tokens/s|memory|^GEN|^PEAK|^PLAN" $n/log | cut -c1-300 | tail -150 > /tmp/pack/$n/log; tail -3 $n/log 2>/dev/null | cut -c1-300 >> /tmp/pack/$n/log;  cp $n/*.json $n/*.csv /tmp/pack/$n/ 2>/dev/null; done
mkdir -p /tmp/src/results; cp -r /tmp/src/results /tmp/src/results_long /tmp/q/state.json /tmp/pack/; cd /tmp/src; for r in runs/*/*; do [ -f $r/metrics.jsonl ] || continue; mkdir -p /tmp/pack/$r; cp $r/result.json $r/metrics.jsonl /tmp/pack/$r/ 2>/dev/null; done; cd /tmp/pack; tar czf /tmp/q.tgz . && mv /tmp/q.tgz $OUT/q.tgz; ls -la $OUT | tail -1
}
pack
late() { python3 -c "import json; raise SystemExit(json.load(open('/tmp/q/state.json'))['t'] < $1)"; }
if late 1700; then for u in 1715 1728 1735 1737 1738 1739 1740 1741 1742 1743 1744 1745 1746 1747 1748 1750; do until late $u; do sleep 0.5; done; pack; done; fi
