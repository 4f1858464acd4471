# wait.sh SECONDS: waits (or until all is done), prints states and the ends of failed logs, packs records.
end=$((SECONDS+$1))
while [ $SECONDS -lt $end ]; do sleep 2; done
python3 - <<'P'
import json,pathlib
s=json.load(open('/tmp/q/state.json')); seen=pathlib.Path('/tmp/q/seen'); old=set(seen.read_text().split()) if seen.exists() else set()
print('t',s['t'],'held',s['held'],'running',s['running'])
new={n:d for n,d in s['done'].items() if n not in old}
print('done', ' '.join(f"{n}:{d['rc']}:{d['s']}s" for n,d in new.items()))
for n,d in new.items():
    if d['rc']!=0: print('---',n,d['rc']); print(open(f'/tmp/q/{n}/log').read()[-900:])
for n in s['running']:
    t=open(f'/tmp/q/{n}/log',errors='replace').read().strip().splitlines(); print('>',n,t[-1][-200:] if t else '')
seen.write_text(' '.join(s['done']))
P
nvidia-smi --query-gpu=memory.used,utilization.gpu --format=csv,noheader
[ -f /tmp/q/mps_said ] || { cat /tmp/q/mps.log /tmp/q/queue.log; touch /tmp/q/mps_said; }; free -g | sed -n 2p
cd /tmp/q && find . -type f -size -3M \( -name '*.json' -o -name '*.jsonl' -o -name '*.csv' -o -name '*.md' -o -name 'log' -o -name '*.txt' \) ! -path '*/checkpoints/*' > /tmp/list && tar czf $OUT/q.tgz -T /tmp/list; ls -la $OUT | tail -2
