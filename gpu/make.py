import pathlib
rows=[]
def add(name,pool,slots,after,limit,cmd): rows.append((name,pool,str(slots),after,str(limit),cmd))
S=[f"/tmp/data/train-0000{i}-of-00003.jsonl.xz" for i in range(3)]; V="/tmp/data/valid.jsonl.xz"
PK=f"--config.data.train_files={S[0]} --config.data.validation_files={V} --config.data.test_files={S[1]}"
BK=f"--config.data.train_files='/tmp/data/train-*.jsonl.xz' --config.data.validation_files={V}"
SW="python3 -m tlinformer_jax sweep --retries=0 --results="
JLA="PYTHONPATH=$PYTHONPATH:/tmp/jla "
TAPS="cd /tmp/taps && PYTHONPATH=/tmp/taps:/tmp/site "
R="/tmp/q/results"
add("prep","cpu",0,f"{S[0]},{S[1]},{V}",300,f"python3 -m tlinformer_jax prepare --config=configs/passkey.py:8k-plus {PK}")
add("prep3","cpu",0,f"{S[0]},{S[1]},{S[2]},{V}",300,f"python3 -m tlinformer_jax prepare --config=configs/books.py:1k-512-0.5 {BK}")
RATES=[f"rate-{k}" for k in range(12)]
add("choose","cpu",0,",".join(RATES),60,"python3 /tmp/carry/choose.py")
# ---- 25
add("rd-12","g",3,"-",1600,f"{JLA}{SW}{R} --sweep=configs/sweep_comparators.py:recall --seeds=0,1,2 --together --point=12 --out=$OUT/run")
add("prefill125","t",1,f"{S[1]}",500,"python3 /tmp/carry/timed.py benchmarks.inference --config=configs/large.py:125m --architectures=transformer --lengths=1000000 --parts=prefill --max_quadratic_prefill=1000000 --seconds=0.5 --out=$OUT")
# ---- recall, curricula
def rp(k,x="",variant="plus",limit=1600,seeds="0,1,2,3,4",more="",slots=3,results=R):
    add(f"rp-{variant}-{k}{x}","g",slots,"-",limit,f"{SW}{results} --sweep=configs/sweep_recall.py:{variant} --seeds={seeds} --together --point={k} --out=$OUT/run {more}")
OWN="$OUT/results"
def cur(c): return f"--config.data.curriculum={c}"
for k,settings in ((13,"512-64"),(25,"1024")): rp(k)            # without shorter samples, to the end
def rc(k): add(f"rc-{k}","g",3,"-",1600,f"{SW}{OWN} --sweep=/tmp/carry/sweep_curricula.py --seeds=0,1,2,3,4 --together --point={k} --out=$OUT/run")
rc(2); rc(0)
# ---- rates
for k in range(12): add(f"rate-{k}","g",3,"prep3",900,f"{SW}{R} --sweep=configs/sweep_options.py:rates --point={k} --out=$OUT/run {BK}")
# ---- passkeys, experiments: /tmp/carry/sweep_pk.py, three seeds a point
PX=["taps","tapsshift","n16","taps-n16","shift","deep","muon","taps256","taps-muon","taps-rot","att-taps","overlap","lr2","long","taps-long","long256"]
def px(name,*seeds):
    for seed in seeds:
        k=3*PX.index(name)+seed
        far="--then=evaluate@8192,evaluate@65536" if name.startswith("att") else "--then=evaluate@8192,evaluate@65536,evaluate@262144"
        add(f"px-{name}-s{seed}","g",2,"prep",1300,f"{TAPS}{SW}{OWN} --sweep=/tmp/carry/sweep_pk.py --out=$OUT/run {PK} --point={k} {far}")
PX+=["c98-shift","c98-taps","c98-shift256","c98-taps256","c98-att","c98-muon"]
for n in PX[16:20]: px(n,0)
for n in PX[16:20]: px(n,1)
px("c98-muon",0)
PX+=["c98-tight-shift","c98-tight-taps","c98-w64-shift","c98-w64-taps","c98x-shift","c98x-tapsshift","c98x-taps","c98x-shift-muon"]
PX+=["k1-shift","k1-tapsshift","k1-shift256"]; px("k1-shift",0,1); px("k1-tapsshift",0,1); px("k1-shift256",0,1)
px("c98x-shift",0,1); px("c98x-tapsshift",0,1); px("c98x-taps",0,1); px("c98x-shift-muon",0)
XX=["c98-tight-shift","c98-tight-taps","c98-w64-shift","c98-w64-taps"]
px("c98-tight-shift",0,1); px("c98-tight-taps",0,1); px("c98-w64-shift",0); px("c98-w64-taps",0)
px("taps",0); px("shift",0); px("n16",0); px("taps-n16",0); px("long",0); px("taps-long",0); px("taps256",0); px("muon",0); px("deep",0); px("long256",0)
px("taps",1); px("shift",1); px("n16",1); px("taps-n16",1); px("taps256",1); px("c98-att",0)
rc(3); rc(1); rc(4)
rp(0,variant="plus-grown"); rp(3,variant="plus-grown")
# ---- books
ARCH=["plain"]*3+["base"]*3+["sliding","no-history"]+["plain"]*6+["base"]*3+["sliding"]
HIST=set(range(3))|set(range(8,14))
for k in (0,3,8,14,11,6,7,12,13,1,9,4,15,17,2,10,5,16):
    then="evaluate,history" if k in HIST else "evaluate"
    add(f"bk-{k}",{10:"3",5:"1",16:"1"}.get(k,"g"),4,"bk-14" if k==16 else "choose",1300,f"{SW}{R} --sweep=configs/sweep_options.py --point={k} --out=$OUT/run {BK} --then={then} --config.train.learning_rate=$(cat /tmp/q/rate-of-{ARCH[k]})")
b16=[r for r in rows if r[0]=="bk-16"][0]; rows.append(("bk-16b","1","4","choose","1300",b16[5]))
# ---- cost of the options
SETS={"none":"","shift":",model.token_shift=True","wave":",model.longest_wavelength=64","overlap":",model.window_overlap=16","all":",model.token_shift=True,model.longest_wavelength=64,model.window_overlap=16"}
for n,s in SETS.items():
    add(f"cost-{n}","t",1,"choose",400,f"python3 /tmp/carry/timed.py benchmarks.training --architectures=tlinformer{',transformer' if n in ('none','shift') else ''} --lengths=1024 --batch_tokens=65536 --steps=20 --set=model.dropout=0.0{s} --out=$OUT")
pathlib.Path("/work/main/.carry/jobs.tsv").write_text("".join("\t".join(r)+"\n" for r in rows)); print(len(rows))
import json; json.dump([r[0] for r in rows],open("/work/scratch/names.json","w"))
# ---- recall: the rest, three seeds
base=len(rows)
for k in (3,2,36, 7,6, 11,10,38, 15,14,39, 19,18,40, 31,35,43,44,30,34,23,41,22,27,26): rp(k,seeds="0,1,2")
pathlib.Path("/work/main/.carry/jobs.tsv").write_text("".join("\t".join(r)+"\n" for r in rows)); print(len(rows))
