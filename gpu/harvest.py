import json,glob,re,shutil,os
G='/work/scratch/gpu/L10/'; root='/work/wt/all/'; M=root+'docs/measurements/'
for d in ('a','b'):
    for f in sorted(glob.glob(f'{G}{d}/results/*.json')): shutil.copy(f, root+'docs/results/'); os.chmod(root+'docs/results/'+os.path.basename(f),0o644)
def dump(name,v):
    with open(M+name,'w') as f: json.dump(v,f,indent=1); f.write('\n')
# stopped cells
old=json.load(open(M+'recall_stopped_h200.json'))
def cell(log,name,seeds,why):
    rows=[]
    for line in open(log,errors='replace'):
        m=re.match(r'update (\d+): [\d,]+ tokens/s; accuracy ([\d. ]+)$',line.strip())
        if m: rows.append([int(m[1]),[float(x) for x in m[2].split()]])
    assert rows,log
    return {'cell':name,'seeds':seeds,'why':why,'validation_accuracy_by_update':rows}
cells=[c for c in old['cells'] if '256-32-tight-plus_delta' not in c['cell']]
lost='stopped, the machine was lost'
five=[0,1,2,3,4]
cells+=[cell(G+'a/rp-plus-grown-0/log','configs/sweep_recall.py:plus-grown, 512-64-grown-plus_tlin-4_lr0.003, another run than the one on record',five,lost),
 cell(G+'a/rp-plus-grown-2/log','configs/sweep_recall.py:plus-grown, 512-64-tight-grown-plus_tlin-4_lr0.003, another run than the one on record',five,lost),
 cell(G+'a/rp-plus-grown-3/log','configs/sweep_recall.py:plus-grown, 1024-128-tight-grown-plus_tlin-4_lr0.003, another run than the one on record',five,lost),
 cell(G+'b/rp-plus-25/log','configs/sweep_recall.py:plus, 1024-128-tight-plus_tlin-4_lr0.003',five,'stopped by a failure of the GPU process that several programs shared'),
 cell(G+'a/rd-12/log','configs/sweep_comparators.py:recall, 1024-128-tight-plus_delta-4_lr0.003',[0,1,2],lost)]
old['cells']=cells; old['commit']='49ede30 and b5f9107 (the last five cells)'
rows=old.pop('cells'); body=json.dumps(old,indent=1)[:-2]; open(M+'recall_stopped_h200.json','w').write(body+',\n "cells": [\n'+',\n'.join('  '+json.dumps(c) for c in rows)+'\n ]\n}\n')
for c in cells: print(c['cell'],c['validation_accuracy_by_update'][-1])
# final figures of speed
def load(n,f): return json.load(open(f'{G}a/{n}/{f}'))
fix=lambda c: c.replace('/tmp/q/','runs/')
training=[]
for n in ('det-off','det-on','tr41-8k','tr125-8192','tr125-2048','wide','tr41-8k-while','tr125-8192-while'):
    t=load(n,'training.json')
    for r in t['rows']: training.append({'environment':'XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL' if n.endswith('while') else '','command':fix(t['command'])}|r)
inference=[]
for n in ('in-base','in-while'):
    t=load(n,'inference.json'); inference.append({'environment':'XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL' if n.endswith('while') else ''}|{k:t[k] for k in ('command','started','ceilings','rows')}); inference[-1]['command']=fix(t['command'])
text=lambda p: [l.rstrip() for l in open(p,errors='replace') if l.strip() and not re.match(r'^[WIE]\d{4}',l)]
repeat={'tlinformer, dropout 0.0':text(G+'a/repeat/log')[1:8],'transformer, dropout 0.0':text(G+'b/repeat-transformer/log'),'tlinformer, dropout 0.1':text(G+'b/repeat-tlinformer/log')}
dump('final_speed_h200.json',{'what':'The package at b5f9107 by its own benchmarks: training of 41M and 125M (random tokens, bfloat16, no dropout), train.deterministic, experts, prefill, token and slide of 41M; two of them with loops in CUDA graphs by a flag of XLA; tools.repeatability.','device':'NVIDIA H200, one of two of a machine','jax':'0.11.2','date':'2026-11-29','commit':'b5f9107','how':'Timed parts had their GPU alone: a script that is not in the repository stopped all other processes on it and waited until it was idle. Processes on the other GPU went on (32 cores). Programs compiled beside others, so compile_seconds are upper limits. tools.repeatability ran beside other work, so its tokens/s are not to be compared; the three models were run by one command (the first) and by two with --config flags, after the machine was lost.','training':training,'inference':inference,'repeatability':repeat,'attention_check':text(G+'a/attn/log')})
# passkeys in windows of 64
p=json.load(open(M+'passkey_wavelengths_h200.json'))
r=json.load(open(G+'b/pk-0-w64-b/results/8k-plus_tlin-4_lr0.001-seed0.json'))
T=r['then']
p['runs']=[x for x in p['runs'] if x['name']!='w64-b64-s0']
p['runs'].append({'name':'w64-b64-s0','architecture':'tlinformer','windows':64,'longest_wavelength':64,'token_shift':True,'rate':0.001,'seed':0,'stages':'256:500@0.9,1024:800@0.9,4096:500@0.9, 200 M tokens','updates':r['steps'],'accuracy':{k.split('@')[1]:v['figures']['accuracy'] for k,v in T.items()},'before_W_oh':{k.split('@')[1]:v['figures']['accuracy_history'] for k,v in T.items()},'validation_by_update':[[h[0],h[2]] for h in r['history']],'seconds':round(r['seconds']['wall']),'parameters':r['parameters']})
t=open(M+'passkey_wavelengths_h200.json').read(); end=t.rindex(']'); t=t[:end].rstrip()+',\n  '+json.dumps(p['runs'][-1])+'\n '+t[end:]; json.loads(t); open(M+'passkey_wavelengths_h200.json','w').write(t); print(p['runs'][-1])
print(repeat)
