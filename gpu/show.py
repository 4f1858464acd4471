import json,glob
for f in sorted(glob.glob('/work/scratch/q/s*/training.json')):
    d=json.load(open(f))
    for r in d['rows']:
        print(f.split('/')[-2], r['length'], r['batch'], r.get('error') or (round(r['tokens_per_second']), f"{r['step_bytes']/1e9:.1f}GB", f"compile {r['compile_seconds']:.0f}", f"mfu {r['mfu']:.3f}"))
