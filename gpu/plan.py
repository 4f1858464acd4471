SH="--config.model.shallow_history=true --results=results_long"
def warmx(name,variant,k,extra=""): add(f"w-{name}","0",1,"/tmp/data/valid.jsonl.xz",150,f"bash /tmp/carry/warm.sh runs/warm_{name} {WSW} --sweep=configs/sweep_evidence.py:{variant} --out=runs/warm_{name} {WV} --point={k} {extra}")
warmx("long-5s","long",5,SH); warmx("rates-23","rates",23); warmx("long-0","long",0); warmx("gap-2s","gap",2,SH)
def job(name,variant,k,after,then,extra="",slots=4): add(name,"0",slots,after,1740,f"{SW} --sweep=configs/sweep_evidence.py:{variant} --out=runs/{name} {EV} --point={k} {then} {extra}")
def watch(name,after="-"): add(f"trained-{name}","cpu",0,after,1740,f"until grep -qE '^step ([0-9]+)/\\1 ' /tmp/q/{name}/log || grep -q '\"{name}\": ..rc' /tmp/q/state.json; do sleep 0.5; done")

def near(name,variant,k,after,then,slots=4): add(name,"0",slots,after,1740,f"mkdir -p /tmp/src/results_long; cd /tmp/srcf; PYTHONPATH=/tmp/srcf:/tmp/site {SW} --sweep=configs/sweep_evidence.py:{variant} --out=runs/{name} {EV} --point={k} {then} --config.model.shallow_history=true --results=/tmp/src/results_long")

T2="--config.train.steps=3052 --config.train.warmup_steps=305 --config.train.eval_every=305 --config.train.checkpoint_every=305"
near("long-5m","long",5,"prep3","--then=evaluate,evaluate@65536 "+T2,6); watch("long-5m","prep3")
job("rates-23","rates",23,"prep3","")
job("long-0","long",0,"trained-long-5m","--then=evaluate,evaluate@65536,history "+T2); watch("long-0","trained-long-5m")
near("gap-2n","gap",2,"trained-long-0","--then=evaluate")
