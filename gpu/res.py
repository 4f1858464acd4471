import json,glob,sys
for p in sorted(glob.glob('/work/scratch/gpu/q/results/*.json')):
    n=p.split('/')[-1][:-5]
    if len(sys.argv)>1 and not any(a in n for a in sys.argv[1:]): continue
    r=json.load(open(p)); print(n, r['steps'], round(r['seconds']['wall']), {k.split('@')[-1]:tuple(round(v['figures'].get(x,-1),3) for x in('accuracy','accuracy_history','accuracy_own')) if 'accuracy' in v['figures'] else round(v['figures']['loss'],3) for k,v in r['then'].items()})
