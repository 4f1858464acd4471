import json,os
for n in ('base-plus-seed0','base-plus-seed1','plus-seed0','causal-plus-seed0','tlin-seed0','sliding-plus-seed0'):
    f='/work/main/docs/results/8k-200m-%s.json'%n
    if not os.path.exists(f): f='/work/scratch/gpu/q/results/8k-200m-%s.json'%n
    if not os.path.exists(f): continue
    d=json.load(open(f)); t=d['then']['evaluate']['test']; p=t['by_position']; e=p['edges']
    def mean(lo,hi):
        s=[(l*k,k) for a,l,k in zip(e,p['loss'],p['tokens']) if lo<=a<hi]; return round(sum(x for x,_ in s)/sum(k for _,k in s),4)
    print(n,[mean(0,256),mean(256,1024),mean(1024,4096),mean(4096,8192)],'first 512',mean(0,512),'rest',mean(1024,8192),t['figures']['perplexity'],d['then']['evaluate']['figures']['perplexity'],t['figures']['bits_per_byte'])
    for k in ('evaluate@65536',):
        if k in d['then']: print(d['then'][k]['test']['figures']['perplexity'],d['then'][k]['test']['figures']['loss'])
