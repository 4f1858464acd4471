import json, pathlib
rows=[]
def add(name,pool,slots,after,limit,cmd): rows.append((name,pool,str(slots),after,str(limit),cmd))
B="--config.data.train_files=/tmp/data/train-00000-of-00003.jsonl.xz --config.data.validation_files=/tmp/data/valid.jsonl.xz --config.data.test_files=/tmp/data/train-00001-of-00003.jsonl.xz"
B3="--config.data.train_files='/tmp/data/train-*.jsonl.xz' --config.data.validation_files=/tmp/data/valid.jsonl.xz"
SW="python3 -m tlinformer_jax sweep --retries=0 --results=/tmp/q/results"
JLA="PYTHONPATH=$PYTHONPATH:/tmp/jla "
T="python3 /tmp/carry/timed.py "
def req(name,limit,slots=1): add(name,"t",slots,f"/tmp/req/{name}/READY"+(",pairs-a" if name=="pairs-c" else ""),limit,f"D=/tmp/req/{name}; W=/tmp/w/{name}; mkdir -p $W; cp -r /tmp/src/. $W; [ -d $D/overlay ] && cp -r $D/overlay/. $W/; cd $W; PYTHONPATH=$W:/tmp/site:/tmp/carry OUT=/tmp/q/{name} bash $D/job.sh")
for r in ("pairs","slide","answers"): req(r,400,2)
for r in ("pairs-a","pairs-c","slide-2","answers-2","pairs-2b","slide-3","pairs-3b"): req(r,450,2)
SHARDS="/tmp/data/train-00000-of-00003.jsonl.xz,/tmp/data/train-00001-of-00003.jsonl.xz"
add("prep","cpu",0,SHARDS,200,f"python3 -m tlinformer_jax prepare --config=configs/passkey.py:8k-plus {B}")
PK=f"{SW} --sweep=configs/sweep_comparators.py:passkey --out=$OUT/run {B}"
def pk(k,x=""):
    far="" if k in (3,4,5,9,10,11) else ",evaluate@1048576"
    add(f"pk-{k}{x}","0",1,"prep",1300,f"{JLA if k>5 else ''}{PK} --point={k} --then=evaluate@8192,evaluate@65536,evaluate@262144{far}")
def rp(k,x=""): add(f"rp-{k}{x}","0",1,"-",700,f"{SW} --sweep=configs/sweep_recall.py:plus --seeds=0,1,2,3,4 --together --point={k} --out=$OUT/run")
def rd(k): add(f"rd-{k}","0",1,"-",900,f"C='{SW} --sweep=configs/sweep_comparators.py:recall --seeds=0,1,2 --together --point={k} --out='; {JLA}$C$OUT/run || (echo WITHOUT KERNELS; $C$OUT/run2)")
def noconv():
    add("books-prep","cpu",0,"/tmp/data/train-00002-of-00003.jsonl.xz,"+SHARDS,200,f"python3 -m tlinformer_jax prepare --config=configs/books.py:1k-512-0.5 {B3}")
    add("noconv","0",2,"books-prep,/tmp/req/noconv/delta.py",900,"W=/tmp/w/noconv; mkdir -p $W; cp -r /tmp/src/. $W; cp /tmp/req/noconv/delta.py $W/tlinformer_jax/models/; cd $W; PYTHONPATH=$W:/tmp/site:/tmp/jla "+f"python3 -m tlinformer_jax sweep --retries=0 --results=$OUT/results --sweep=configs/sweep_comparators.py:books --point=3 --out=$OUT/run {B3}")
pk(0)
rp(17)
rp(1); rd(0); rd(1); rd(4); pk(6); pk(9)
rp(13,"c"); rp(21); rd(5); rd(8); rp(25); rd(9); pk(3); noconv()
rd(12); rd(13); rp(29); rp(33)
for k in (10,11,6,7,2,3,14,15,16,17): rd(k)
for k in range(0,36,4): rp(k)
for k in (1,2,7,10): pk(k)
for k in range(36,45): rp(k)
for k in range(3,36,4): rp(k)
for k in range(2,36,4): rp(k)
E41="--lengths=1024 --batch_tokens=65536 --steps=15"
for arch in ("tlinformer","transformer"):
    for name,fields in (("dense",""),("moe",",model.num_experts=8,model.experts_per_token=2,model.d_ff=640"),("wide",",model.d_ff=5120")):
        add(f"ex2-{name}-{arch}","t",1,"-",300,f"{T}benchmarks.training --architectures={arch} {E41} --set=model.dropout=0.0{fields} --out=$OUT")
for name,dep in (("off3","False"),("on4","True")):
    add(f"det-{name}","t",1,"-",300,f"{T}benchmarks.training --architectures=tlinformer --lengths=512 --batch_tokens=65536 --steps=20 --set=model.dropout=0.0,train.deterministic={dep} --out=$OUT")
A=[("transformer","transformer",""),("sliding","sliding_window",""),("tlin256","tlinformer",""),("tlin1024","tlinformer","--window=1024"),("delta","gated_deltanet",""),("jla","gated_deltanet","")]
for name,arch,window in A:
    add(f"in2-125M-{name}","t",1,"-",500,f"{JLA if name=='jla' else ''}{T}benchmarks.inference --config=configs/large.py:125m --architectures={arch} {window} --lengths=1024,100000,1000000 --parts=prefill,sustained,slide --seconds=0.3 --out=$OUT")
add("in-41M-jla","t",1,"-",400,f"{JLA}{T}benchmarks.inference --architectures=gated_deltanet --lengths=100000 --parts=prefill,sustained --seconds=0.3 --out=$OUT")
for name in ("delta","jla"):
    add(f"tr-41M-{name}","t",1,"-",400,f"{JLA if name=='jla' else ''}{T}benchmarks.training --architectures=gated_deltanet --lengths=2048 --batch_tokens=131072 --steps=15 --set=model.dropout=0.0 --out=$OUT")
for name,pre,arch in (("on5","JAX_ENABLE_COMPILATION_CACHE=false ","tlinformer"),("on6","","transformer")):
    add(f"det-{name}","t",1,"-",300,f"{pre}{T}benchmarks.training --architectures={arch} --lengths=512 --batch_tokens=65536 --steps=10 --set=model.dropout=0.0,train.deterministic=True --out=$OUT")
add("det-main","t",1,"-",110,f"python3 -m tlinformer_jax.main --config=configs/books.py:512-512-0.5 {B3} --config.model.dropout=0.0 --config.train.batch_size=128 --config.train.steps=6 --config.train.eval_every=0 --config.train.warmup_steps=2 --config.train.log_every=2 --config.train.deterministic=True --workdir=/tmp/q/det-main/run")
add("det-on7","t",1,"-",110,f"{T}benchmarks.training --architectures=transformer --lengths=512 --batch_tokens=65536 --steps=10 --set=model.dropout=0.0,train.deterministic=True --out=$OUT")
add("repeat","t",1,"-",600,"python3 -m tools.repeatability --updates=300")
DONE=set("pairs slide answers rp-9 rp-5 ex-dense-transformer ex-moe-transformer ex-wide-transformer ex-dense-tlinformer ex-moe-tlinformer ex-wide-tlinformer in2-125M-tlin256 in2-125M-tlin1024 in2-125M-delta in2-125M-jla rp-1b pk-6b rp-13b".split())
rows=[r for r in rows if r[0] not in DONE]
STOP=set(r[0] for r in rows if r[0][:3] in ("rp-","rd-","pk-"))-set("pk-0 rp-17 rp-1 rd-0 rd-1 rd-4 pk-6 pk-9 rp-13c rp-21 rd-5 rd-8".split())
rows=[r for r in rows if r[0] not in STOP]
rows.sort(key=lambda r:r[0]!="noconv")
pathlib.Path("/work/main/.carry/jobs.tsv").write_text("".join("\t".join(r)+"\n" for r in rows)); print(len(rows))
