import json,glob,re,os
G='/work/scratch/gpu/final/'; M='/work/wt/all/docs/measurements/'
done=json.load(open(G+'state.json'))['done']
src=open('/work/main/.carry/sweep_pk2.py').read(); ns={}; exec(src[src.index('def windows'):src.index('def get_sweep')],ns)
runs=[]
for d in sorted(glob.glob(G+'pk*')):
    n=os.path.basename(d)
    if done.get(n,{}).get('rc')==2: continue
    log=open(d+'/log',errors='replace').read(); p=glob.glob(d+'/results/*.json')
    if not log.strip(): continue
    m=re.match(r'pk([bef]?)-(.+)-s(\d)$',n); code,name,seed=m[1],m[2],int(m[3])
    st=re.findall(r'stage on samples of ([\d,]+) tokens ends after ([\d,]+)',log); seen=[]
    for a,b,c in re.findall(r'evaluation at step (\d+): loss ([\d.]+)  accuracy ([\d.]+)',log):
        row=[int(a),float(c),float(b)]
        if row not in seen: seen.append(row)
    taps='rows' if code in('','b') else 'embeddings'
    row={'name':f'{name}-seed{seed}','seed':seed,'code':{'':'rows','b':'rows','e':'embeddings','f':'embeddings'}[code],'fields':ns['POINTS'][name]}
    if p:
        r=json.load(open(p[0])); c=r['config']; assert c['train']['seed']==seed
        row|={'updates':r['steps'],'accuracy':{k.split('@')[1]:v['figures']['accuracy'] for k,v in r['then'].items()},'before_W_oh':{k.split('@')[1]:v['figures'].get('accuracy_history') for k,v in r['then'].items()},'nats_a_digit':{k.split('@')[1]:round(v['figures']['loss'],4) for k,v in r['then'].items()}}
        f=G+f'far-{seed}/eval.json'
        if name=='e5' and os.path.exists(f):
            e=json.load(open(f))['figures']; row['accuracy']['1048576']=e['accuracy']; row['before_W_oh']['1048576']=e['accuracy_history']; row['nats_a_digit']['1048576']=round(e['loss'],4)
        ans=r['then'].get('evaluate@262144',{}).get('answers')
    else: row['end']={'killed':'stopped to leave the GPU to other runs'}.get(done.get(n,{}).get('rc'),'stopped with the machine')
    uniq=[]
    for a,b in st:
        x=[int(a.replace(',','')),int(b.replace(',',''))]
        if x not in uniq: uniq.append(x)
    row|={'stages_ended_at':uniq,'validation_by_update':seen}
    runs.append(row)
order={'e5':0,'e3':1}
head={'what':"configs/passkey.py:8k-plus as of commit b42b8d1 (four numbers in books in GPT-2 tokens, one asked for; token shift, wavelengths up to 64, windows of 256) with the fields named; 'steps' is train.steps, with a warm-up of a tenth of them. Trained on the first shard of the books, evaluated on 200 samples a length of the second; chance 0.25. accuracy and before_W_oh by length of the sample; stages_ended_at: [length of the samples, updates of the stage]; validation_by_update: [update, accuracy, nats a digit].",
 'code':{'rows':'model.key_taps adds learned multiples of the rows before to the input of the keys of C\' (and, without model.token_shift, of block 0): commit b982c4c','embeddings':'model.key_taps adds learned multiples of the embeddings before, in later blocks only, as the package has it now: branch of commit b982c4c, its last commit'},
 'device':'NVIDIA H200, one of two of a machine, beside up to 15 other programs','jax':'0.11.2','date':'2026-11-30'}
import subprocess
head['code']['embeddings']=head['code']['embeddings'].replace('branch of commit b982c4c, its last commit','commit '+subprocess.check_output(['git','-C','/work/wt/taps','rev-parse','--short','HEAD'],text=True).strip())
body=json.dumps(head,indent=1)[:-2]
open(M+'passkey_taps_h200.json','w').write(body+',\n "runs": [\n'+',\n'.join('  '+json.dumps(c) for c in runs)+'\n ]\n}\n')
json.load(open(M+'passkey_taps_h200.json'))
for r in runs: print(r['name'],r['code'],r.get('accuracy'),r.get('before_W_oh',{}).get('8192'),r['stages_ended_at'],r.get('end'),r['validation_by_update'][-1:])
# cost in generation
gen=[]
for n,o in (('none',''),('shift','model.token_shift'),('wave','model.longest_wavelength = 64'),('overlap','model.window_overlap = 16'),('all','all three')):
    t=json.load(open(f'{G}hit-{n}/inference.json'))
    for r in t['rows']:
        gen.append({'option':o or 'none','command':re.sub(r'/tmp/q/hit-\w+','runs/cost',t['command']),'length':r['length'],'hit_ms':round(1e3*r['figure9']['hit_seconds'],4),'miss_ms':round(1e3*r['figure9']['miss_seconds'],3),'slide_ms':round(1e3*r['slide']['seconds'],3),'prefill_ms':round(1e3*r['prefill']['seconds'],3),'cache_bytes':r['cache_bytes'],'peak_bytes':r['memory']['peak_bytes']})
json.dump({'what':'Latency and memory of generation of a 41M TLinFormer (windows of 256) with the options beyond the paper; random weights, bfloat16, batch 1.','device':'NVIDIA H200, one of two of a machine','jax':'0.11.2','date':'2026-11-30','commit':'b42b8d1','how':'Timed parts had their GPU alone: a script that is not in the repository stopped all other processes on it and waited until it was idle. The 32 processor cores were busy with some 30 programs, so the calls at 1,024 and 100,000 tokens, which the processor limits, are upper limits: docs/speed.md has 0.2 to 0.4 ms a hit on an idle machine.','rows':gen},open(M+'options_generation_h200.json','w'),indent=1); open(M+'options_generation_h200.json','a').write('\n')
