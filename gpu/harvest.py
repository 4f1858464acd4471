import json,glob,re,shutil,os,sys
G='/work/scratch/gpu/q/'; root='/work/wt/all/'; M=root+'docs/measurements/'
for f in sorted(glob.glob(G+'results/*.json')):
    t=root+'docs/results/'+os.path.basename(f); shutil.copy(f,t); os.chmod(t,0o644)
print(len(glob.glob(G+'results/*.json')),'records')
old=json.load(open(M+'recall_stopped_h200.json'))
def cell(name_,cellname,seeds,why):
    rows=[]
    for line in open(G+name_+'/log',errors='replace'):
        m=re.match(r'update (\d+): [\d,]+ tokens/s; accuracy ([\d. ]+)$',line.strip())
        if m: rows.append([int(m[1]),[float(x) for x in m[2].split()]])
    assert rows,name_
    uniq=[]; [uniq.append(r) for r in rows if r not in uniq]
    return {'cell':cellname,'seeds':seeds,'why':why,'validation_accuracy_by_update':uniq}
five,three=[0,1,2,3,4],[0,1,2]
time='stopped to leave the GPU to other runs'
cells=[c for c in old['cells'] if '1024-128-tight-plus_delta' not in c['cell']]
for c in cells:
    if '1024-128-tight-grown' in c['cell'] or '512-64-grown-plus' in c['cell']: c['why']+='; with the shorter samples that plus-grown had until 29 November (64:600,128:600,256:800 and, for 1,024 tokens, 512:800)'
S='configs/sweep_recall.py:plus, '
cells+=[cell('rp-plus-13',S+'512-64-plus_tlin-4_lr0.003, another run',five,time),
 cell('rp-plus-25',S+'1024-128-tight-plus_tlin-4_lr0.003, another run',five,time),
 cell('rc-1','512-64-plus_tlin-4_lr0.003 with model.longest_wavelength=64',five,time),
 cell('rc-4','1024-128-tight-grown-plus_tlin-4_lr0.003 with model.longest_wavelength=64 and the curriculum 64:600,128:600,256:800,512:800',five,time),
 cell('rp-plus-2',S+'64-4-plus_tconst-4_lr0.003',three,time),cell('rp-plus-6',S+'128-8-plus_tconst-4_lr0.003',three,time),
 cell('rp-plus-10',S+'256-16-plus_tconst-4_lr0.003',three,time),cell('rp-plus-36',S+'64-4-plain_tlin-4_lr0.003',three,time),
 cell('rp-plus-38',S+'256-16-plain_tlin-4_lr0.003',three,time)]
done=json.load(open(G+'state.json'))['done']
if done.get('rp-plus-grown-3',{}).get('rc')!=0: cells.append(cell('rp-plus-grown-3','configs/sweep_recall.py:plus-grown, 1024-128-tight-grown-plus_tlin-4_lr0.003, another run',five,'stopped with the machine'))
old['commit']='49ede30, b5f9107 and, from the second run of 512-64-plus on, d95db2a'
old.pop('cells'); rows=cells; body=json.dumps(old,indent=1)[:-2]; open(M+'recall_stopped_h200.json','w').write(body+',\n "cells": [\n'+',\n'.join('  '+json.dumps(c) for c in rows)+'\n ]\n}\n')
for c in rows[-11:]: print(c['cell'],c['validation_accuracy_by_update'][-1])
# complete runs of other curricula
cur=[]
for k,what in ((0,'512-64 with 64:1500'),(2,'1024-128-tight with 512:2500'),(3,'1024-128-tight with 128:1000,512:1500')):
    runs=[]
    for p in sorted(glob.glob(f'{G}rc-{k}/results/*.json')):
        r=json.load(open(p)); runs.append({'seed':r['seed'],'updates':r['steps'],'accuracy':r['then']['evaluate']['figures']['accuracy'],'before_W_oh':r['then']['evaluate']['figures']['accuracy_history'],'validation_by_update':[[h[0],h[2]] for h in r['history']]})
    cur.append({'setting':what,'runs':runs})
import subprocess
for name,what in (('512-64-grown-plus','512-64 with 64:600,128:600,256:800'),('1024-128-tight-grown-plus','1024-128-tight with 64:600,128:600,256:800,512:800')):
    runs=[]
    for seed in range(5):
        r=json.loads(subprocess.check_output(['git','-C',root,'show',f'd95db2a:docs/results/{name}_tlin-4_lr0.003-seed{seed}.json']))
        runs.append({'seed':r['seed'],'updates':r['steps'],'accuracy':r['then']['evaluate']['figures']['accuracy'],'before_W_oh':r['then']['evaluate']['figures']['accuracy_history'],'validation_by_update':[[h[0],h[2]] for h in r['history']]})
    cur.append({'setting':what+' (commit b5f9107, two H200s of another machine)','runs':runs})
json.dump({'what':'configs/recall.py with model.token_shift and other shorter samples (data.curriculum), five seeds of each as one program (--together), rate 0.003; accuracy is of the test split. The second runs of the first two, by configs/sweep_recall.py:plus-grown, are in docs/results.','device':'NVIDIA H200, one of four of a machine, beside other programs','jax':'0.11.2','date':'2026-11-29','commit':'d95db2a','settings':cur},open(M+'recall_curricula_h200.json','w'),indent=1); open(M+'recall_curricula_h200.json','a').write('\n')
# passkeys
runs=[]
for d in sorted(glob.glob(G+'px-*')):
    n=os.path.basename(d); log=open(d+'/log',errors='replace').read(); p=glob.glob(d+'/results/*.json')
    st=re.findall(r'stage on samples of (\d+) tokens ends after ([\d,]+)',log)
    ev=re.findall(r'evaluation at step (\d+): loss ([\d.]+)  accuracy ([\d.]+)',log); seen=[]; [seen.append([int(a),float(c),float(b)]) for a,b,c in ev if [int(a),float(c),float(b)] not in seen]
    row={'name':n[3:],'end':done.get(n,{}).get('rc')}
    if p:
        r=json.load(open(p[0])); c=r['config']; m,t=c['model'],c['train']
        row|={'seed':r['seed'],'windows':[m['history_window'],m['generation_window']],'architecture':m['architecture'],'token_shift':m['token_shift'],'key_taps':m.get('key_taps',0),'longest_wavelength':m['longest_wavelength'],'num_blocks':m['num_blocks'],'optimizer':t['optimizer'],'rate':t['learning_rate'],'needles':c['data']['num_items'],'curriculum':c['data']['curriculum'],'updates':r['steps'],'accuracy':{k.split('@')[1]:v['figures']['accuracy'] for k,v in r['then'].items()},'before_W_oh':{k.split('@')[1]:v['figures'].get('accuracy_history') for k,v in r['then'].items()},'nats_a_digit':{k.split('@')[1]:round(v['figures']['loss'],4) for k,v in r['then'].items()}}
    row|={'stages_ended_at':[[int(a),int(b.replace(',',''))] for a,b in st],'validation_by_update':seen}
    runs.append(row)
spec={}
exec(open('/work/main/.carry/sweep_pk.py').read().split('def get_sweep')[0].split('from tlinformer_jax')[0])
src=open('/work/main/.carry/sweep_pk.py').read(); src=src[src.index('W128 ='):src.index('def get_sweep')]; ns={}; exec(src,ns)
keep=[]
for r in runs:
    base=r['name'].rsplit('-s',1)[0]
    f=dict(ns['POINTS'].get(base,{}))
    r={'name':r['name'],'fields':f}|{k:v for k,v in r.items() if k!='name'}
    if r['end']=='killed': r['end']='stopped to leave the GPU to other runs'
    else: r.pop('end')
    keep.append(r)
head={'what':"configs/passkey.py:8k-plus (four numbers in books in GPT-2 tokens, one asked for; token shift, wavelengths up to 64, windows of 256) with the fields named; 'steps' is train.steps, with a warm-up of a tenth of them. model.key_taps is the experiment that main's history keeps (commit 'Experiment: key taps on today's main'): the input of the first keys of every block is rows_t + sum over k = 1..3 of s_k rows_(t-k); without model.token_shift in block 0, too. Trained on the first shard of the books, evaluated on 200 samples a length of the second, chance 0.25. stages_ended_at: [length of the samples, updates of the stage]; validation_by_update: [update, accuracy, nats a digit].",'device':'NVIDIA H200, one of four of a machine, beside other programs','jax':'0.11.2','date':'2026-11-29','commit':'b843828 (w-taps)'}
body=json.dumps(head,indent=1)[:-2]
open(M+'passkey_stages_h200.json','w').write(body+',\n "runs": [\n'+',\n'.join('  '+json.dumps(c) for c in keep)+'\n ]\n}\n')
json.load(open(M+'passkey_stages_h200.json'))
# cost of options
cost=[]
for n in ('none','shift','wave','overlap','all'):
    t=json.load(open(f'{G}cost-{n}/training.json'))
    for r in t['rows']: cost.append({'command':t['command'].replace('/tmp/q/','runs/')}|r)
pre=[l.strip() for l in open(G+'prefill125/log',errors='replace') if 'rematerialization' in l or 'out of memory' in l]
json.dump({'what':'Speed and memory of training 41M TLinFormer at N = 1,024 with the options beyond the paper (65,536 tokens a step, no dropout), and of the Transformer with and without the shift.','device':'NVIDIA H200, one of four of a machine','jax':'0.11.2','date':'2026-11-29','commit':'d95db2a','how':'Timed parts had their GPU alone: a script that is not in the repository stopped all other processes on it and waited until it was idle. Programs compiled beside others, so compile_seconds are upper limits.','training':cost},open(M+'options_speed_h200.json','w'),indent=1); open(M+'options_speed_h200.json','a').write('\n')
print(pre)
