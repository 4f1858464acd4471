import pathlib
rows=[]
def add(name,pool,slots,after,limit,cmd): rows.append((name,pool,str(slots),after,str(limit),cmd))
S0,S1="/tmp/data/train-00000-of-00003.jsonl.xz","/tmp/data/train-00001-of-00003.jsonl.xz"
B=f"--config.data.train_files={S0} --config.data.validation_files=/tmp/data/valid.jsonl.xz --config.data.test_files={S1}"
SW="python3 -m tlinformer_jax sweep --retries=0 --results="
JLA="PYTHONPATH=$PYTHONPATH:/tmp/jla "
T="python3 /tmp/carry/timed.py "
W="XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL "
R="/tmp/q/results"
add("prep","cpu",0,f"{S0},{S1}",200,f"python3 -m tlinformer_jax prepare --config=configs/passkey.py:8k-plus {B}")
M1="[ -e /tmp/q/mps1_ok ] && export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps1 CUDA_VISIBLE_DEVICES=0; "
def pk(k,x="",pool="0",more="",results=R):
    far="" if k in (3,4,5,9,10,11) else ",evaluate@1048576"
    add(f"pk-{k}{x}",pool,1,"prep" if pool=="0" else "prep,/tmp/q/probed1",900,f"{M1 if pool=='1' else ''}{JLA if k>5 else ''}{SW}{results} --sweep=configs/sweep_comparators.py:passkey --out=$OUT/run {B} --point={k} --then=evaluate@8192,evaluate@65536,evaluate@262144{far} {more}")
M1="[ -e /tmp/q/mps1_ok ] && export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps1 CUDA_VISIBLE_DEVICES=0; "
def rp(k,x="",pool="1",variant="plus",limit=1000,seeds="0,1,2,3,4"): add(f"rp-{variant}-{k}{x}",pool,1,"/tmp/q/probed1" if pool=="1" else "-",limit,f"{M1 if pool=='1' else ''}{SW}{R} --sweep=configs/sweep_recall.py:{variant} --seeds={seeds} --together --point={k} --out=$OUT/run")
def rd(k,pool="0"): add(f"rd-{k}",pool,1,"/tmp/q/probed",1300,f"{JLA}{SW}{R} --sweep=configs/sweep_comparators.py:recall --seeds=0,1,2 --together --point={k} --out=$OUT/run")
# timings, on the last GPU
t="--seconds=0.5 --out=$OUT"
add("repeat","t",1,"-",700,"python3 -m tools.repeatability --updates=300")
add("in-base","t",1,"-",400,f"{T}benchmarks.inference --architectures=tlinformer --lengths=100000,1000000 --parts=prefill,sustained,slide {t}")
add("in-while","t",1,"-",400,f"{W}{T}benchmarks.inference --architectures=tlinformer --lengths=100000,1000000 --parts=prefill,sustained,slide {t}")
D="--lengths=512 --batch_tokens=65536 --steps=20 --set=model.dropout=0.0,train.deterministic="
add("det-on","t",1,"-",400,f"{T}benchmarks.training --architectures=tlinformer,transformer {D}True --out=$OUT")
add("tr41-8k","t",1,"-",400,f"{T}benchmarks.training --architectures=tlinformer --lengths=8192 --batch_tokens=262144 --steps=8 --set=model.dropout=0.0 --out=$OUT")
add("tr41-8k-while","t",1,"-",400,f"{W}{T}benchmarks.training --architectures=tlinformer --lengths=8192 --batch_tokens=262144 --steps=8 --set=model.dropout=0.0 --out=$OUT")
add("attn","t",1,"-",200,"python3 -m benchmarks.attention --check --backends=triton")
add("det-off","t",1,"-",400,f"{T}benchmarks.training --architectures=tlinformer,transformer {D}False --out=$OUT")
L="model.vocab_size=50304,model.d_model=768,model.num_heads=12,model.num_blocks=3,model.dropout=0.0"
for n,b in ((8192,65536),(2048,65536)):
    for x,w in (("",""),("-while",W)):
        add(f"tr125-{n}{x}","t",1,"-",400,f"{w}{T}benchmarks.training --architectures=tlinformer --lengths={n} --batch_tokens={b} --steps=15 --set={L} --out=$OUT")
add("wide","t",1,"-",300,f"{T}benchmarks.training --architectures=tlinformer --lengths=1024 --batch_tokens=65536 --steps=15 --set=model.dropout=0.0,model.d_ff=5120 --out=$OUT")
BASE="--config=configs/tiny.py --config.model.d_model=256 --config.model.num_heads=4 --config.model.history_window=64 --config.model.generation_window=64 --config.data.sequence_length=512 --config.train.batch_size=32 --config.train.learning_rate=1e-3"
for a,d in (("transformer",0.0),("tlinformer",0.1)): add(f"repeat-{a}","t",1,"-",900,f"python3 -m tools.repeatability --updates=300 {BASE} --config.model.architecture={a} --config.model.dropout={d}")
# the last GPU: recall with the shift, passkeys in shorter windows
for k in (0,2,1,3): rp(k,variant="plus-grown")
for k in (25,29,33): rp(k)
W64="--config.model.history_window=64 --config.model.generation_window=64"
pk(0,"-w64","1",W64,"$OUT/results"); pk(1,"-w64","1",W64,"$OUT/results")
pk(3,"","1")
# GPU 0: Gated DeltaNet and its hybrid in recall
for k in (8,10,12,6,9,11,13,7,2,14,16,3,15,17): rd(k)
for k in range(0,36,4): rp(k,pool="0")
for k in (4,1,7,10): pk(k)
for k in (44,40,38,41,42,37,39,43,36): rp(k,seeds="0,1,2")
for k in range(2,36,4): rp(k,seeds="0,1,2")
for k in range(3,36,4): rp(k,seeds="0,1,2")
DONE=set("repeat in-base in-while det-on tr41-8k tr41-8k-while attn det-off tr125-8192 tr125-8192-while tr125-2048 tr125-2048-while wide rp-plus-grown-1".split())
rows=[r for r in rows if r[0] not in DONE]
pathlib.Path("/work/main/.carry/jobs.tsv").write_text("".join("\t".join(r)+"\n" for r in rows)); print(len(rows))
rows=[]
for k in (9,3,15,17,2,14,16,8): rd(k)
for k in (0,2,3): rp(k,variant="plus-grown")
rp(33)
pk(3,"","1"); pk(0,"-w64","1",W64,"$OUT/results")
rows=[(r[0]+"-b",)+r[1:] for r in rows]
pathlib.Path("/work/main/.carry/jobs.tsv").write_text("".join("\t".join(r)+"\n" for r in rows)); print(len(rows))
n=len(rows)
for k in (7,6): rd(k)
rows=rows[:n]+[(r[0]+"-b",)+r[1:] for r in rows[n:]]
pathlib.Path("/work/main/.carry/jobs.tsv").write_text("".join("\t".join(r)+"\n" for r in rows)); print(len(rows))
n=len(rows)
for k in (11,13,10): rd(k)
rows=rows[:n]+[(r[0]+"-b",)+r[1:] for r in rows[n:]]
pathlib.Path("/work/main/.carry/jobs.tsv").write_text("".join("\t".join(r)+"\n" for r in rows)); print(len(rows))
