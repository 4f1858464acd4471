rows=[]
def add(name,gpu,slots,after,limit,cmd): rows.append((name,gpu,str(slots),after,str(limit),cmd))
B="--config.data.train_files='/tmp/data/train-*.jsonl.xz' --config.data.validation_files=/tmp/data/valid.jsonl.xz"
SW="python3 -m tlinformer_jax sweep --retries=0 --results=/tmp/results"
# --- the data, as soon as all shards are there
add("prep","cpu",0,"/tmp/data/train-00000-of-00003.jsonl.xz,/tmp/data/train-00001-of-00003.jsonl.xz,/tmp/data/train-00002-of-00003.jsonl.xz",200,
 f"time python3 -m tlinformer_jax prepare --config=configs/books.py:1k-512-0.5 {B}")
# --- speed of training: 48 rows
M={"41M":("",131072),"125M":("--config=configs/large.py:125m --set=model.memory=auto",65536)}
A=[("transformer","transformer",""),("sliding","sliding_window",""),("tlin256","tlinformer",""),("tlin1024","tlinformer","--window=1024"),("delta","gated_deltanet",""),("jla","gated_deltanet","")]
for model,(flags,tokens) in M.items():
    for n in (512,2048,8192,65536):
        for name,arch,window in A:
            if name=="tlin1024" and n==512: continue
            steps=5 if n==65536 else 15 if model=="41M" else 10
            pre="NOLOCK=1 PYTHONPATH=$PYTHONPATH:/tmp/jla " if name=="jla" else "NOLOCK=1 " if name=="delta" else ""
            slow=name in ("jla","delta")
            if slow: pre="env -u JAX_PLATFORMS CUDA_VISIBLE_DEVICES=0 "+pre
            add(f"{'s2' if slow else 'sp'}-{model}-{n}-{name}","cpu" if slow else "0",0 if slow else 1,"-",500,f"{pre}python3 /tmp/carry/timed.py benchmarks.training {flags} --architectures={arch} {window} --lengths={n} --batch_tokens={max(n,tokens)} --steps={steps} --set=model.dropout=0.0 --out=$OUT")
for model,flags in (("41M",""),("125M","--config=configs/large.py:125m")):
    for name,arch,window in A:
        pre="NOLOCK=1 PYTHONPATH=$PYTHONPATH:/tmp/jla " if name=="jla" else "NOLOCK=1 " if name=="delta" else ""
        slow=name in ("jla","delta")
        if slow: pre="env -u JAX_PLATFORMS CUDA_VISIBLE_DEVICES=0 "+pre
        quad="--max_quadratic_prefill=1000000" if (model,name)==("41M","transformer") else ""
        add(f"in-{model}-{name}","cpu" if slow else "0",0 if slow else 1,"-",500,f"{pre}python3 /tmp/carry/timed.py benchmarks.inference {flags} --architectures={arch} {window} --lengths=1024,100000,1000000 --parts=prefill,sustained,slide --seconds=0.3 {quad} --out=$OUT")
# --- recall of the comparators: while the shards arrive, on GPU 1
for k in range(18):
    add(f"rd-{k}","any",1,"sp-125M-65536-tlin1024",400,f"{SW} --sweep=configs/sweep_comparators.py:recall --seeds=0,1,2 --together --point={k} --out=$OUT/run --config.train.steps=1500@0.99 --config.train.warmup_steps=150")
add("books-1","1",3,"prep",560,f"{SW} --sweep=configs/sweep_comparators.py:books --point=1 --then=evaluate,history --out=$OUT/run {B}")
for k in (0,2,3,4):
    pre="PYTHONPATH=$PYTHONPATH:/tmp/jla " if k>2 else ""
    add(f"books-{k}","1",0 if k>2 else 3,"prep",900,f"{pre}{SW} --sweep=configs/sweep_comparators.py:books --point={k} --out=$OUT/run {B}")
add("ex-3b","1",0,"-",800,f"{SW} --sweep=configs/sweep_comparators.py:experts --point=3 --out=$OUT/run {B}")
for k in range(4):
    add(f"ex-{k}","1",0 if k==3 else 3,"prep" if k<3 else "books-4",800,f"{SW} --sweep=configs/sweep_comparators.py:experts --point={k} --out=$OUT/run {B}")
late=[]
for r in list(rows):
    if r[0].startswith("s2-") and r[0].endswith("jla") and r[0] not in ("s2-41M-512-jla","s2-41M-2048-jla","s2-41M-8192-jla") : late.append(("s3"+r[0][2:],)+r[1:4]+("600",)+r[5:])
    if r[0] in ("in-41M-delta","in-41M-jla"): late.append(("i2"+r[0][2:],)+r[1:4]+("600",)+r[5:])
import os
def req(name,limit,slots=1,env="",gpu="0"):
    return (name,gpu,str(slots),"/tmp/req/%s/READY"%name,str(limit+200),f"D=/tmp/req/{name}; W=/tmp/w/{name}; mkdir -p $W; cp -r /tmp/src/. $W; [ -d $D/overlay ] && cp -r $D/overlay/. $W/; cd $W; {env} PYTHONPATH=$W:/tmp/site OUT=/tmp/q/{name} flock -x /tmp/gpulock0 bash $D/job.sh")
first=[req("k1",110),req("k3",100),req("k2",115)]; rows_=[r for r in rows if not r[0].startswith(('books','ex-'))]; iin=[k for k,r in enumerate(rows_) if r[0].startswith("in-125M")][0]
second=[req("k1-hit",110)]
third=[req("k3-2",120),req("k2-4",120),req("k3-3",120)]
i125=[k for k,r in enumerate([r for r in rows if not r[0].startswith(("books","ex-"))]) if r[0].startswith("sp-125M")][0]
for flags,nm in (("--xla_gpu_autotune_level=0","auto0"),("--xla_gpu_enable_triton_gemm=false","notriton"),("--xla_backend_optimization_level=1","opt1")):
    add(f"s2-{nm}","cpu",0,"-",500,f"env -u JAX_PLATFORMS CUDA_VISIBLE_DEVICES=0 NOLOCK=1 XLA_FLAGS={flags} python3 /tmp/carry/timed.py benchmarks.training --architectures=gated_deltanet --lengths=512 --batch_tokens=131072 --steps=15 --set=model.dropout=0.0 --out=$OUT")
books=[r for r in rows if r[0].startswith(('books','ex-'))]; rows=[r for r in rows if r not in books]
rows=books+first+rows[:i125]+second+[r for r in rows[i125:iin] if not r[0].startswith("in-")]+[r for r in rows[i125:iin] if r[0].startswith("in-")]+third[:2]+late
open("/work/main/.carry/jobs.tsv","w").write("".join("\t".join(r)+"\n" for r in rows)); print(len(rows))
