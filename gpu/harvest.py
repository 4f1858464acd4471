import json,glob,re,shutil,os,sys
root=sys.argv[1]
Q='/work/scratch/keep/lease2/'
for src in ('/work/scratch/keep/lease1/results/','/work/scratch/keep/lease2/results/'):
    for f in glob.glob(src+'*.json'): shutil.copy(f, f'{root}/docs/results/')
# cells that were stopped: from their logs
def cell(log,name,seeds,why):
    rows=[]; 
    for line in open(log,errors='replace'):
        m=re.match(r'update (\d+): [\d,]+ tokens/s; accuracy ([\d. ]+)$',line.strip())
        if m: rows.append([int(m[1]),[float(x) for x in m[2].split()]])
    return {'cell':name,'seeds':seeds,'why':why,'validation_accuracy_by_update':rows}
cells=[cell(Q+'rp-17/log','configs/sweep_recall.py:plus, 256-32-tight-plus_tlin-4_lr0.003',[0,1,2,3,4],'all 6,103 updates; ended by its time limit before the test split was read'),
 cell(Q+'rp-13c/log','configs/sweep_recall.py:plus, 512-64-plus_tlin-4_lr0.003',[0,1,2,3,4],'stopped half-way, the machine had to be given back'),
 cell(Q+'rp-21/log','configs/sweep_recall.py:plus, 512-64-tight-plus_tlin-4_lr0.003',[0,1,2,3,4],'stopped half-way, likewise'),
 cell(Q+'rd-8/log','configs/sweep_comparators.py:recall, 256-32-tight-plus_delta-4_lr0.003',[0,1,2],'stopped after a third, likewise')]
json.dump({'what':'Cells of recall whose runs were stopped before their records were written; accuracies are of the validation split, which ends a run at 0.99 but keeps a --together program going until all its seeds have ended','device':'NVIDIA H200, up to eight programs at a time','jax':'0.11.2','date':'2026-11-29','commit':'49ede30','cells':cells},open(f'{root}/docs/measurements/recall_stopped_h200.json','w'),indent=1); open(f'{root}/docs/measurements/recall_stopped_h200.json','a').write('\n')
a=json.load(open(Q+'noconv/results/delta-1k-seed0.json')); b=json.load(open(f'{root}/docs/results/delta-1k-seed0.json'))
keys=('command','device','jax','parameters','steps','tokens','speed','validation','history')
out={'what':'Gated DeltaNet of configs/sweep_comparators.py:books (point 3) with and without its short convolution. Without: the convolution\'s weights of earlier rows were fixed at zero, but for the row before in the keys of the first layer, which is what model.token_shift gives the other models. By a change of models/delta.py that is not in the repository; SiLU and everything else stayed.','date':'2026-11-29','without':{k:a[k] for k in keys},'with':{k:b[k] for k in keys}}
json.dump(out,open(f'{root}/docs/measurements/delta_convolution_h200.json','w'),indent=1); open(f'{root}/docs/measurements/delta_convolution_h200.json','a').write('\n')
for k in ('without','with'): print(k, out[k]['validation']['loss'], out[k]['validation']['loss_first_window'], out[k]['validation']['loss_later_windows'], out[k]['history'][-3:])
for c in cells: print(c['cell'], c['validation_accuracy_by_update'][-1])
