import json,re,glob
Q='/work/scratch/gpu/q/'
def plan(n):
    for l in open(Q+n+'/log'):
        if l.startswith('PLAN') and '{' in l:
            try: return json.loads(l[l.index('{'):])
            except ValueError:  # cut at 300 characters
                d=dict(re.findall(r'"(\w+)": ([0-9.e+-]+)',l)); return {k:float(v) for k,v in d.items()}
def gen(n):
    for l in open(Q+n+'/log'):
        if l.startswith('GEN') and '{' in l: return json.loads(l[l.index('{'):])
def peak(n):
    for l in open(Q+n+'/log'):
        if l.startswith('PEAK'): return int(l.split()[-1])
def row(n,length,what,commit):
    p=plan(n); return {"length":length,"what":what,"commit":commit,"tokens_per_second":round(p["tokens_per_second"]),"step_seconds":round(p["step_seconds"],4),"step_bytes":int(p["step_bytes"]),"first_loss":round(p["first_loss"],4),"last_loss":round(p["last_loss"],4)}
A="3087eed1"
training=[row("1k-b",1024,"causal history",A),row("2k-b",2048,"causal history",A),row("prof-8k",8192,"causal history",A),row("64k-b",65536,"causal history",A)]
training+=[row(f"tr-{L}",L,"Transformer",A) for L in (1024,2048,8192,65536)]
pieces=[row("p8k-b",8192,"causal history, heads of 36 features as 32 and 16 in kernels/dropout.py",A+" with a patch"),row("drop-src",1024,"Transformer, dropout 0.1",A),row("drop-src_p",1024,"Transformer, dropout 0.1, heads of 36 features as 32 and 16",A+" with a patch")]
NEW="efef051b"
generation=[]
for n,L,what,c in (("gen-c",1000000,"causal history, before: keys of windows by gathers",A),("gen-a",1000000,"the same behind a barrier (not kept)",A+" with a patch"),("gen-b",1000000,"neighbouring windows as one slice, XLA sorts the whole cache first (not kept)",A+" with a patch"),("gen-e",1000000,"causal history, neighbouring windows as one slice, layout of the rows as in the cache (kept)",NEW),("gc-100000",100000,"causal history, kept",NEW),("gc-1024",1024,"causal history, kept",NEW),("gen-p",1000000,"as published",A),("gp-100000",100000,"as published",NEW),("gp-1024",1024,"as published",NEW)):
    generation.append({"length":L,"what":what,"commit":c,**{k+"_ms":v for k,v in gen(n).items()},"peak_bytes":peak(n)})
d={"what":"41M models with the token shift, windows 256/256, bfloat16: training steps of 65,536 random tokens without dropout, after block 0's compress runs once for a whole sample; and generation, batch 1, random weights: a prompt, a slide, and 256 tokens in the device loop (milliseconds).",
"device":"NVIDIA H200","jax":"0.11.2","date":"2026-12-01",
"how":"Scripts that are not in the tree (this repository's history, folder gpu/ of the commit 'Keep how the GPU session of the afternoon of 1 December was run') called benchmarks.steps.time_case (20 steps in groups of 5 after 3 others; the median over the groups) and the operations of benchmarks.session, while all other processes on the GPU were stopped. Commands that measure the same: python -m benchmarks.training --architectures=tlinformer,transformer --lengths=1024,2048,8192,65536 --batch_tokens=65536 --steps=20 --set=model.dropout=0.0,model.token_shift=True,model.causal_history=True (a Transformer without the last option); python -m benchmarks.inference --config=configs/books.py:1k-512-0.5 --config.model.token_shift=true --config.model.causal_history=true --architectures=tlinformer --lengths=1024,100000,1000000 --parts=prefill,sustained,slide --seconds=0.3",
"training":training,"head_pieces":pieces,"generation":generation}
json.dump(d,open('/work/wt/pre/docs/measurements/causal_speed_h200.json','w'),indent=1); print(json.dumps(d,indent=0)[:200])
for r in training+pieces: print(r)
for r in generation: print(r)
