import json,glob
for f in sorted(glob.glob('/work/scratch/q/*/run/*/result.json')):
    r=json.load(open(f)); v=r['validation']
    print(r['name'], r['parameters'], r.get('active_parameters'), r['tokens'], round(r['seconds']['wall']), r['speed'], {k:round(x,4) if isinstance(x,float) else x for k,x in v.items()}, list(r['then']))
    print('   ', r['then'].get('history'), {k:(v if not isinstance(v,dict) else {a:b for a,b in list(v.items())[:14]}) for k,v in r['then'].items() if k!='history'} if 0 else '')
