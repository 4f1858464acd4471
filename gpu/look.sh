n=$(ls -t /work/.device | grep -v in | head -1); rm -rf /work/scratch/gpu/q; mkdir -p /work/scratch/gpu/q; tar xzf /work/.device/$n/q.tgz -C /work/scratch/gpu/q; cd /work/scratch/gpu/q
python3 - "$n" <<'P'
import json,re,os,sys
s=json.load(open('state.json')); print('call',sys.argv[1],'t',s['t'],'free',s['free'],'held',s['held'])
print('done',' '.join(f"{n}:{d['rc']}:{d['s']}@{d['gpu']}" for n,d in s['done'].items()))
for n,r in s['running'].items():
    t=open(f'{n}/log',errors='replace').read().strip().splitlines(); print(n,r,(t[-1] if t else '')[-150:])
P
