speed()
for k in (26,27,22,23,41): recall(k)                     # long, need no text
pk(0,FAR+",evaluate@1048576"); pk(1,FAR+",evaluate@1048576"); pk(2); pk(3); pk(4)
for k in (36,37,42,43,39,45): niah("1k-plus",k,"0,1,2")  # mk
for k in (24,25,30,12,13,18,19,0,1,6): niah("1k-plus",k,"0,1,2")
for k in (34,35,30,31,43,44): recall(k)
for v,k in (("4k-plus",36),("4k-plus",42),("16k-plus",36)):
    niah(v,k,"0,1,2",then="--then=evaluate@16384,evaluate@65536,evaluate@262144" if v=="16k-plus" else "")
for c in (39,57,30,48,12): cap(c)                        # tconst by pairs
for c in (36,37,38,46,47,51,52,53,25,26): cap(c)
def onto(gpu,start):
    for i in range(start,len(rows)): r=list(rows[i]); r[1]=gpu; rows[i]=tuple(r)
start=len(rows)
rate(19,slots=6); rate(9,slots=6); onto('0',start); start=len(rows)
for k in (14,16,21,23,7): rate(k,slots=13)
onto("1",start); start=len(rows)
add("long-mk-42","0",2,"prep",600,f"{SW.replace('results=results','results=results_long')} --sweep=configs/sweep_niah.py:1k-plus --seeds=0,1,2 --out=runs/niah_longer {PK} --point=42 --config.train.steps=6103@0.99 --config.train.warmup_steps=610 --config.data.curriculum=256:2500@0.98")
for v in ("s5-64","parity-256","s5-256"):
    for k in range(0,12,3): state(v,k)
for c in (90,102,72,78,96): cap(c)                       # tconst by rows
for c in (69,75,81,93,99): cap(c)
for v,k in (("4k-plus",12),("4k-plus",18)): niah(v,k,"0,1,2")
for k in (14,15,18): pk(k)
for c in (40,58,31,49,13,91,103,73,79,97): cap(c)
for v in ("s5-64","parity-256","s5-256"):
    for k in range(1,12,3): state(v,k)
onto("0",start)
