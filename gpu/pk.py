import json,glob,re,sys
for p in sorted(glob.glob('/work/scratch/gpu/q/pk*-*/results/*.json')):
    r=json.load(open(p)); T=r['then']
    print(p.split('/q/')[1].split('/')[0].ljust(22),r['steps'],' '.join(f"{k.split('@')[1]}:{v['figures']['accuracy']:.3f}({v['figures'].get('accuracy_history',0):.3f}, {v['figures']['loss']:.3f})" for k,v in T.items()),'|',' '.join(f"{h[0]}:{h[2]:.2f}" for h in r['history']))
for p in sorted(glob.glob('/work/scratch/gpu/q/pk*-*/log')):
    n=p.split('/')[-2]; t=open(p,errors='replace').read()
    st=re.findall(r'stage on samples of (\d+) tokens ends after (\d+)',t); ev=re.findall(r'evaluation at step (\d+): loss ([\d.]+)  accuracy ([\d.]+)',t)
    print(n.ljust(20),st,' '.join(f"{a}:{c}({float(b):.2f})" for a,b,c in ev))
