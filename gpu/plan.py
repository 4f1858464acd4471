SE="--sweep=configs/sweep_evidence.py:8k"
for n,p in dict(b="1,31,0",c="4,8,0").items(): add(f"plan-{n}","0",0,"-",110,f"python3 /tmp/carry/plantime.py {p}")
add("inf","0",0,"-",140,"python3 /tmp/carry/timed.py benchmarks.inference --config=configs/books.py:1k-512-0.5 --config.model.token_shift=true --config.model.causal_history=true --architectures=tlinformer --lengths=1000000 --parts=figure9,prefill,slide --max_uncached_length=1 --seconds=0.3 --out=$OUT")
def warmd(name,tree,k): add(f"w-{name}","0",0,"/tmp/data/valid.jsonl.xz",150,f"cd {tree}; export PYTHONPATH={tree}:/tmp/site; mkdir -p runs/warm_{name}; bash /tmp/carry/warm.sh runs/warm_{name} {WSW}_{name} {SE} --out=runs/warm_{name} {WV} --point={k}")
add("trees","cpu",0,"-",30,"for t in b c; do cp -r /tmp/src /tmp/src$t; done; sed -i 's/^CAUSAL_GROUP, CAUSAL_SEGMENTS, CAUSAL_STORED = .*/CAUSAL_GROUP, CAUSAL_SEGMENTS, CAUSAL_STORED = 31, 1, 32/' /tmp/srcb/tlinformer_jax/config/model.py; grep -n '^CAUSAL_GROUP' /tmp/src?/tlinformer_jax/config/model.py; touch /tmp/q/trees_done")
V0="/tmp/data/valid.jsonl.xz"
for n,tree,k in (("causal-b","/tmp/srcb",2),("causal-c","/tmp/srcc",2),("base","/tmp/src",0),("plus","/tmp/src",1)):
    warmd(n,tree,k)
rows[:]=[(r[0],r[1],r[2],"choose,"+r[3],r[4],r[5]) if r[0] in ("w-base","w-plus") else r for r in rows]
rows[:]=[(r[0],r[1],r[2],"/tmp/q/trees_done,"+r[3],r[4],r[5]) if r[0].startswith("w-") else r for r in rows]
add("choose","cpu",0,"plan-b,plan-c",20,"python3 /tmp/carry/choose.py")
T2=""
def job(name,k,after,then,slots=4): add(name,"0",slots,after,1740,f"{SW} {SE} --out=runs/{name.rstrip(chr(50))} {EV} --point={k} --then={then}")
def watch(name,after="-"): add(f"trained-{name}","cpu",0,after,1740,f"until grep -qE '^step ([0-9]+)/\\1 ' /tmp/q/{name}/log || grep -q '\"{name}\": ..rc' /tmp/q/state.json; do sleep 0.5; done")
job("base",0,"trained-causal","evaluate,evaluate@65536,history,evaluate@100000"); watch("base","trained-causal")
job("causal2",2,"trained-base","evaluate,evaluate@65536,history,evaluate@100000,evaluate@500000"); watch("causal2","trained-base")
job("plus",1,"trained-causal2","evaluate,evaluate@65536,history"); watch("plus","trained-causal2")
add("far-causal","0",0,"causal2",1740,"python3 -m tlinformer_jax evaluate --workdir=runs/causal/8k-200m-causal-plus-seed0 --split=test --lengths=1000000 --out=$OUT/far.json")
add("prof-c","0",0,"choose",200,"python3 /tmp/carry/plantime.py 4,8,0 profile")
add("plan-d","0",0,"choose",200,"python3 /tmp/carry/plantime.py 8,4,0")
add("prof-log","cpu",0,"prof-c",10,"cp /tmp/q/prof-c/log $OUT/kernels.csv")
add("dump","0",0,"choose",200,"python3 /tmp/carry/dump.py 4,8,0 loop_add_fusion_83 loop_slice_fusion_30 loop_add_fusion_84 loop_add_fusion_113 loop_multiply_fusion_17 wrapped_broadcast_5 loop_add_fusion_133 dropout_attention_key_gradient__3")
for n,p in dict(s="1,31,0",s4="4,8,0").items(): add(f"plan-{n}","0",0,"/tmp/srcf/docs",200,f"cd /tmp/srcf; export PYTHONPATH=/tmp/srcf:/tmp/site; export OUT=/tmp/q/plan-{n}; python3 /tmp/carry/plantime.py {p} profile; cp /tmp/q/plan-{n}/log /tmp/q/plan-{n}/log.csv")
add("tiles","0",0,"plan-s",200,"cd /tmp/srcf; export PYTHONPATH=/tmp/srcf:/tmp/site; python3 /tmp/carry/tiles.py")
add("warmlog","cpu",0,"w-plus",20,"cp /tmp/q/w-plus/warm.txt $OUT/warm.csv")
def lens(n,tree,p,length): add(f"len-{n}","0",0,"tiles",260,f"cd {tree}; export PYTHONPATH={tree}:/tmp/site; python3 /tmp/carry/plantime.py {p} length={length}")
lens("64k-a","/tmp/srcf","1,32,1",65536); lens("64k-b","/tmp/srcf","2,8,1",65536); lens("2k-a","/tmp/srcf","1,7,0",2048); lens("2k-b","/tmp/src","2,3,1",2048); lens("1k-a","/tmp/srcf","0,0,0",1024); lens("1k-b","/tmp/src","0,0,0",1024)
def leng(n,p,length,more=""): add(f"g-{n}","0",0,"/tmp/srcg/docs",220,f"cd /tmp/srcg; export PYTHONPATH=/tmp/srcg:/tmp/site; python3 /tmp/carry/plantime.py {p} length={length} {more}; [ -f $OUT/log ] && cp $OUT/log $OUT/log.csv")
leng("64k","0,0,0",65536,"profile"); leng("8k","0,0,0",8192,"profile")
