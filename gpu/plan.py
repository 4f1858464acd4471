SE="--sweep=configs/sweep_evidence.py:8k"
def warmd(name,k,after,seed): add(f"w-{name}","0",0,f"{after}",150,f"mkdir -p runs/warm_{name}; bash /tmp/carry/warm.sh runs/warm_{name} {WSW}_{name} {SE} --seeds={seed} --out=runs/warm_{name} {WV} --point={k}")
VALID="/tmp/data/valid.jsonl.xz"
warmd("tlin",4,VALID,0)
def job(name,k,seed,after,then,slots=4): add(name,"0",slots,after,1740,f"{SW} {SE} --seeds={seed} --out=runs/{name} {EV} --point={k} --then={then}")
def watch(name,after="-"): add(f"trained-{name}","cpu",0,after,1740,f"until grep -qE '^step ([0-9]+)/\\1 ' /tmp/q/{name}/log || grep -q '\"{name}\": ..rc' /tmp/q/state.json; do sleep 0.5; done")
def rc(k,after="-",lim=900,seeds="0,1,2",together=" --together"): add(f"rc-{k}","0",0,after,lim,f"{SW} --sweep=configs/sweep_recall.py:causal --seeds={seeds}{together} --out=runs/recall_plain_{k} --point={k}")
for k in (0,1,2,7): rc(k)
job("tlin",4,0,"prep3,w-tlin","evaluate,history,evaluate@65536"); watch("tlin","prep3")
add("prepn","cpu",0,"unpack",300,f"python3 -m tlinformer_jax prepare --config=configs/niah.py:mk-1k-plus {PK}")
def pk(k,seed,after): add(f"pk-{seed}","0",0,after,900,f"{SW} --sweep=configs/sweep_passkey.py:plus --out=runs/passkey_causal {PK} --point={k} --then={FAR}")
def ni(k,after): add(f"ni-{k}","0",0,after,650,f"{SW} --sweep=configs/sweep_niah.py:1k-plus-causal --out=runs/niah_causal_{k} {PK} --point={k}")
T="trained-tlin"
job("sliding",3,0,T,"evaluate,evaluate@65536"); watch("sliding",T)
S="trained-sliding"
def far(n,lengths): add(f"far-{n}","0",0,f"tlin,{S}",900,f"python3 -m tlinformer_jax evaluate --workdir=runs/tlin/8k-200m-tlin-seed0 --split=test --lengths={lengths} > $OUT/far.txt 2>&1; cat $OUT/far.txt; cp $OUT/far.txt $OUT/far.csv")
far("100k","100000"); far("1m","1000000")
pk(21,0,f"prepn,{S}"); ni(10,f"prepn,{S}"); ni(6,f"prepn,{S}")
add("pa-0","0",0,"pk-0",600,f"{SW} --sweep=configs/sweep_state.py:causal --seeds=0 --out=runs/parity_0")
ni(11,f"prepn,ni-6"); rc(3,"ni-10"); rc(8,"ni-10"); pk(22,1,"pk-0,ni-6")
ni(1,"pk-0"); ni(4,"pk-0"); 
add("pa-a","0",0,"ni-1",160,f"{SW} --sweep=configs/sweep_state.py:causal --seeds=0 --out=runs/parity_0")
