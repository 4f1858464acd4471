import pathlib
rows=[]
def add(name,pool,slots,after,limit,cmd): rows.append((name,pool,str(slots),after,str(limit),cmd))
S=[f"books/train-0000{i}-of-00003.jsonl.xz" for i in range(3)]; V="books/valid.jsonl.xz"
D=[f"/tmp/data/train-0000{i}-of-00003.jsonl.xz" for i in range(3)]; DV="/tmp/data/valid.jsonl.xz"
PK=f"--config.data.train_files={S[0]} --config.data.validation_files={V} --config.data.test_files={S[1]}"
EV=f"--config.data.train_files={S[0]},{S[1]},books/train-rest.jsonl.xz --config.data.validation_files={V} --config.data.test_files=books/test.jsonl.xz"
SW="python3 -m tlinformer_jax sweep --retries=0 --results=results"
P="/tmp/data/"; PARTS=",".join(f"{P}{n}.{k:02d}.bz3" for n in ("train-00000-of-00003","train-00001-of-00003","train-rest") for k in range(4))
add("unpack","cpu",0,PARTS,300,"python3 /tmp/carry/unpack.py")
add("prep3","cpu",0,f"unpack,{P}test.jsonl.xz,{P}valid.jsonl.xz",500,f"python3 -m tlinformer_jax prepare --config=configs/books.py:1k-512-0.5 {EV}")
WV="--config.data.train_files=books/valid.jsonl.xz --config.data.validation_files=books/valid.jsonl.xz --config.data.test_files=books/valid.jsonl.xz"
WSW=SW.replace("results=results","results=results_warm")
def warm(n,variant,k,gpu,after="/tmp/data/valid.jsonl.xz"): add(f"w{n}-{variant}-{k}",gpu,1,after,150,
    f"bash /tmp/carry/warm.sh runs/warm_{variant}_{k} {WSW} --sweep=configs/sweep_evidence.py:{variant} --out=runs/warm_{variant}_{k} {WV} --point={k}" if n==1 else
    f"{WSW} --sweep=configs/sweep_evidence.py:{variant} --out=runs/warm2_{variant}_{k} {WV} --point={k} --then=evaluate,history,samples --config.train.steps=20 --config.train.warmup_steps=2 --config.train.eval_every=20 --config.train.checkpoint_every=20")
def book(variant,k,gpu,after="prep3",then="--then=evaluate,history,samples"): add(f"{variant}-{k}",gpu,2,after,1700,f"{SW} --sweep=configs/sweep_evidence.py:{variant} --out=runs/{variant} {EV} --point={k} {then}")
FAR="evaluate@8192,evaluate@65536,evaluate@262144"
def pk(k,then=FAR,slots=2,after="prep",pool="g"): add(f"pk-{k}",pool,slots,after,1500,f"{SW} --sweep=configs/sweep_passkey.py:plus --out=runs/passkey_plus {PK} --point={k} --then={then}")
def niah(variant,k,seeds,slots=2,then=""): add(f"niah-{variant}-{k}","g",slots,"prep",1500,f"{SW} --sweep=configs/sweep_niah.py:{variant} --seeds={seeds} --out=runs/niah_{variant} {PK} --point={k} {then}")
def recall(k): add(f"rp-{k}","g",2,"-",1600,f"{SW} --sweep=configs/sweep_recall.py:plus --seeds=0,1,2 --together --out=runs/recall_plus --point={k}")
CAP="--config.train.steps=4000@0.99 --config.train.warmup_steps=400 --config.data.curriculum=64:700@0.8,128:700@0.8,256:700@0.8,512:700@0.8"
def cap(k,after="-"): add(f"cap-{k}","g",1,after,1500,f"{SW} --sweep=configs/sweep_capacity.py --seeds=0,1,2 --out=runs/capacity {CAP} --point={k}")
# warm-up a tenth of the updates; a stage ends at 95% of the labels or after 500 updates
STATE="--config.train.steps=3051@0.99 --config.train.warmup_steps=305"
CUR={"s5-64":"8:500@0.95,16:500@0.95,32:500@0.95","s5-256":"8:400@0.95,16:400@0.95,32:400@0.95,64:400@0.95,128:400@0.95","parity-256":"16:500@0.95,32:500@0.95,64:500@0.95,128:500@0.95"}
def state(v,k): add(f"st-{v}-{k}","g",1,"-",1500,f"{SW} --sweep=configs/sweep_state.py:{v} --seeds=0,1,2 --out=runs/state_{v} {STATE} --config.data.curriculum={CUR[v]} --point={k}")
def rate(k,slots=4): add(f"rate-{k}","g",slots,"prep3",900,f"{SW} --sweep=configs/sweep_evidence.py:rates --out=runs/rates {EV} --point={k}")
TIMED="python3 /tmp/carry/timed.py"
def speed(after="-"):
    add("speed-train","t",1,after,700,f"{TIMED} benchmarks.training --architectures=tlinformer --lengths=1024 --batch_tokens=65536 --steps=20 --set=model.dropout=0.0 --try=model.key_taps=0 --try=model.key_taps=5 --try=model.token_shift=True,model.longest_wavelength=64,model.key_taps=5 --out=$OUT")
    for n,s in {"none":"","taps":"--config.model.key_taps=5","memory":"--config.model.token_shift=true --config.model.longest_wavelength=64 --config.model.key_taps=5"}.items():
        add(f"speed-{n}","t",1,after,400,f"{TIMED} benchmarks.inference --config=configs/books.py:1k-512-0.5 {s} --architectures=tlinformer --lengths=1024,100000,1000000 --parts=figure9,prefill,slide --max_uncached_length=1 --seconds=0.3 --out=$OUT")
exec(open('/work/scratch/plan.py').read())
pathlib.Path("/work/main/.carry/jobs.tsv").write_text("".join("\t".join(r)+"\n" for r in rows)); print(len(rows))
