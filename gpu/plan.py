H="--then=evaluate,history"; A="--then=evaluate,history,samples"
def w1(k,gpu,after="/tmp/data/valid.jsonl.xz"): warm(1,"gap",k,gpu,after)
def w2(k,gpu,then,after): add(f"w2-gap-{k}",gpu,1,after,200,f"{WSW} --sweep=configs/sweep_evidence.py:gap --out=runs/warm2_gap_{k} {WV} --point={k} {then} --config.train.steps=20 --config.train.warmup_steps=2 --config.train.eval_every=20 --config.train.checkpoint_every=20")
w1(6,"0"); w1(1,"1"); w1(4,"0"); w1(0,"1")
w1(5,"0","w1-gap-6"); w1(2,"1","w1-gap-1"); w1(3,"0","w1-gap-4"); w1(7,"1","w1-gap-0")
w2(6,"0",H,"w1-gap-5"); w2(1,"1",A,"w1-gap-2")
def b(k,gpu,then): book("gap",k,gpu,"prep3",then)
b(6,"0",H); b(1,"1",A)
def c(k,gpu,then,slots=12): add(f"gap-{k}",gpu,slots,"prep3",1700,f"{SW} --sweep=configs/sweep_evidence.py:gap --out=runs/gap {EV} --point={k} {then}")
rows[:]=[r for r in rows if not r[0].startswith("gap-")]
c(6,"0",H,11); c(1,"1",A,11)
add("books-15b","0",11,"prep3",1700,f"mkdir -p /tmp/src/results_long; cd /tmp/srcf; ln -sfn /tmp/src/results_long results; ls -la results; PYTHONPATH=/tmp/srcf:/tmp/site {SW} --sweep=configs/sweep_evidence.py:books --out=runs/books {EV} --point=15 --then=evaluate,history")
for k,t in ((0,A),(4,H),(5,H),(7,H)): c(k,"1",t,11)
add("stuck","cpu",0,"-",1800,"bash /tmp/carry/stuck.sh")
