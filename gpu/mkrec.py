import json,glob,os,re
Q='/work/scratch/q/'
NAMES={"transformer":"Transformer","sliding":"sliding window","tlin256":"TLinFormer, windows of 256","tlin1024":"TLinFormer, windows of 1,024","delta":"Gated DeltaNet","jla":"Gated DeltaNet, kernels"}
HOW="Each row is a process of its own. Processes compiled at the same time, up to 24 on 32 CPU cores (so compile_seconds are upper limits); a lock gave the GPU to one process while it was timed."
import sys; sys.path.insert(0,'/work/wt/docs')
from benchmarks.plots import WORDS
print(WORDS)
for model,out in (("41M","comparators_training_h200.json"),("125M","comparators_training_125m_h200.json")):
    rows=[];commands={}
    for short,name in NAMES.items():
        for n in (512,2048,8192,65536):
            cands=[f"{p}-{model}-{n}-{short}" for p in ("sp","s2","s3","sj")]
            found=[c for c in cands if os.path.exists(Q+c+"/training.json") and json.load(open(Q+c+"/training.json"))["rows"]]
            if not found: print("missing",model,n,short); continue
            d=json.load(open(Q+found[0]+"/training.json")); r=d["rows"][0]
            tokens=r["tokens"]
            rows.append({"model":name,"length":n,"flops":r["model_flops"]/tokens,"seconds":r["step_seconds"]/tokens,"tokens":tokens,"tokens_per_second":r["tokens_per_second"],"mfu":r["mfu"],"step_seconds":r["step_seconds"],"compile_seconds":r["compile_seconds"],"step_bytes":r["step_bytes"],"error":r.get("error")})
            commands.setdefault(name, re.sub(r" --out=\S+","",d["command"]).replace("--lengths=512","--lengths=N").replace("--lengths=2048","--lengths=N"))
            dev,jx=d["device"],d["jax"]
    json.dump({"command":"; ".join(commands.values()),"how":HOW,"device":dev,"devices":1,"jax":jx,"date":"2026-11-29","rows":rows},open('docs/measurements/'+out,'w'),indent=1); open('docs/measurements/'+out,'a').write("\n")
    for r in rows: print(model,r["model"],r["length"],round(r["tokens_per_second"]/1e3,1),round(r["step_bytes"]/1e9,1),round(r["compile_seconds"]),round(r["mfu"],3))
def gen(files,out,drop=lambda n,r:False):
    base=None; rows=[]; cmds=[]
    for n in files:
        d=json.load(open(Q+n+"/inference.json")); cmds.append(re.sub(r" --out=\S+","",d["command"]))
        base=base or d
        rows+= [r for r in d["rows"] if not drop(n,r)]
    base={k:v for k,v in base.items() if k not in("rows","longest")}
    base["command"]="; ".join(cmds); base["how"]=HOW.replace("(so compile_seconds are upper limits)","").replace("  "," "); base["rows"]=rows
    json.dump(base,open('docs/measurements/'+out,'w'),indent=1); open('docs/measurements/'+out,'a').write("\n")
gen(["in-41M-transformer","in-41M-sliding","in-41M-tlin256","i2-41M-delta"],"comparators_generation_h200.json")
gen(["in-41M-tlin1024"],"comparators_generation_1024_h200.json")
gen(["i2-41M-jla"],"comparators_generation_kernels_h200.json",lambda n,r:r["length"]==100000)
