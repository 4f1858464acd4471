import pathlib, json, sys
rows=[]
def add(name,pool,slots,after,limit,cmd): rows.append((name,pool,str(slots),after,str(limit),cmd))
S=[f"/tmp/data/train-0000{i}-of-00003.jsonl.xz" for i in range(3)]; V="/tmp/data/valid.jsonl.xz"
PK=f"--config.data.train_files={S[0]} --config.data.validation_files={V} --config.data.test_files={S[1]}"
BK=f"--config.data.train_files='/tmp/data/train-*.jsonl.xz' --config.data.validation_files={V}"
SW="JAX_COMPILATION_CACHE_DIR=/tmp/jc python3 -m tlinformer_jax sweep --retries=0 --results="
TAPS="cd /tmp/taps && PYTHONPATH=/tmp/taps:/tmp/site "
R="/tmp/q/results"; OWN="$OUT/results"
add("prep","cpu",0,f"{S[0]},{S[1]},{V}",300,f"python3 -m tlinformer_jax prepare --config=configs/passkey.py:8k-plus {PK}")
add("prep3","cpu",0,f"{S[0]},{S[1]},{S[2]},{V}",300,f"python3 -m tlinformer_jax prepare --config=configs/books.py:1k-512-0.5 {BK}")
src=open('/work/main/.carry/sweep_pk2.py').read(); ns={}; exec(src[src.index('def windows'):src.index('def get_sweep')],ns); PX=list(ns['POINTS'])
def pk(name,*seeds,slots=2,x="",code="TAPS",then="--then=evaluate@8192,evaluate@65536,evaluate@262144"):
    for seed in seeds:
        k=5*PX.index(name)+seed
        where={"TAPS":TAPS,"EMB":TAPS.replace("/tmp/taps","/tmp/emb5")}[code]
        add(f"pk{x}-{name}-s{seed}","g",slots,"prep",1500,f"{where}{SW}{OWN} --sweep=/tmp/carry/sweep_pk2.py --out=$OUT/run {PK} --point={k} {then}")
def state(): 
    for k in range(12): add(f"st-{k}","g",1,"-",1500,f"{SW}{R} --sweep=configs/sweep_state.py --seeds=0,1,2 --point={k} --points=12 --out=$OUT/run")
def cap():
    for k in range(21): add(f"cap-{k}","g",1,"-",1500,f"{SW}{R} --sweep=configs/sweep_capacity.py --seeds=0,1,2 --point={k} --points=21 --out=$OUT/run --config.train.steps=4000@0.99 --config.train.warmup_steps=400 --config.data.curriculum=64:700@0.8,128:700@0.8,256:700@0.8,512:700@0.8")
NP="--config.model.token_shift=true --config.model.longest_wavelength=64"
def niah(variant,ks,points,seeds,slots=2,more=""):
    for k in ks: add(f"niah-{variant}-{k}","g",slots,"prep",1500,f"{SW}{R} --sweep=configs/sweep_niah.py:{variant} --seeds={seeds} --point={k} --points={points} --out=$OUT/run {PK} {NP} {more}")
def overlap(n=32,pool="g"): add(f"ov-{n}",pool,6,"prep3",1300,f"{SW}{R} --sweep=/tmp/carry/sweep_ov.py --point={0 if n==32 else 1} --out=$OUT/run {BK}")
def recall(*ks,steps=""):
    for k in ks: add(f"rp-{k}","g",2,"-",1600,f"{SW}{R} --sweep=configs/sweep_recall.py:plus --seeds=0,1,2 --together --point={k} --out=$OUT/run")
SETS={"none":"","shift":"--config.model.token_shift=true","wave":"--config.model.longest_wavelength=64","overlap":"--config.model.window_overlap=16","all":"--config.model.token_shift=true --config.model.longest_wavelength=64 --config.model.window_overlap=16"}
def hits():
    for n,s in SETS.items(): add(f"hit-{n}","t",1,"-",500,f"python3 /tmp/carry/timed.py benchmarks.inference --config=configs/books.py:1k-512-0.5 {s} --architectures=tlinformer --lengths=1024,100000,1000000 --parts=figure9,prefill,slide --max_uncached_length=1 --seconds=0.3 --out=$OUT")
exec(open('/work/scratch/plan.py').read())
pathlib.Path("/work/main/.carry/jobs.tsv").write_text("".join("\t".join(r)+"\n" for r in rows)); print(len(rows))
