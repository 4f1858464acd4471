import json,math,sys,numpy as np
R='/work/main/docs/results/8k-200m-%s.json'
import os
def load(n):
    for f in (R%n,'/work/scratch/gpu/q/results/8k-200m-%s.json'%n):
        if os.path.exists(f): return json.load(open(f))
names=['base-plus-seed0','base-plus-seed1','plus-seed0','causal-plus-seed0','tlin-seed0','sliding-plus-seed0']
recs={n:load(n) for n in names}; recs={n:d for n,d in recs.items() if d}
def pos(e,lo,hi):
    p=e['by_position']; return p
for n,d in recs.items():
    e=d['then']['evaluate']; t=e['test']
    print('==',n,'steps',d['steps'],'tokens/s',d['speed']['tokens_per_second'],'wall',d['seconds'],'peak',d['peak_bytes'])
    print(' val ppl',e['figures']['perplexity'],'test',t['figures']['perplexity'],t['figures']['loss'],t['figures']['bits_per_byte'])
    p=t['by_position']; 
    if n==names[0]: print({k:(v if len(str(v))<200 else str(v)[:200]) for k,v in p.items()})
    ends=p.get('ends') or p.get('edges'); 
    for k,v in d['then'].items():
        if '@' in k: print(' ',k,v['figures']['perplexity'], v.get('test') and v['test']['figures']['perplexity'])
    h=d['then'].get('history')
    if h: print(' cuts',[(c.get('distance') or c, ) for c in h['cuts']][:6] if not isinstance(h['cuts'][0],dict) else h['cuts'])
    print(' history',[(r[0],round(r[1],3)) for r in d['history']])
def doc(n,split):
    e=recs[n]['then']['evaluate']; b=(e if split=='val' else e['test'])['by_document']; return np.array(b['loss']),np.array(b['tokens'])
rng=np.random.default_rng(0)
def compare(a,b):
    for split in ('val','test'):
        la,ta=doc(a,split); lb,_=doc(b,split); d=la-lb; m=d.sum()/ta.sum()
        idx=rng.integers(0,len(d),(10000,len(d))); boot=d[idx].sum(1)/ta[idx].sum(1)
        print(a,'-',b,split,round(m,4),np.round(np.percentile(boot,[2.5,97.5]),4),'lower in',(d<0).sum(),'of',len(d))
import itertools
for a,b in itertools.combinations(recs,2): compare(b,a)
