import sys; sys.path.insert(0,'/tmp/ppm')
import bz3, lzma, pathlib
from concurrent.futures import ThreadPoolExecutor, ProcessPoolExecutor
B=pathlib.Path('/work/scratch/books'); O=pathlib.Path('/work/scratch/parts'); O.mkdir(exist_ok=True)
names=['train-00000-of-00003','train-00001-of-00003','train-rest']
def one(a):
    n,i,d=a; (O/f'{n}.{i:02d}.bz3').write_bytes(bz3.compress(d,64<<20)); return len(d)
jobs=[]
for n in names:
    d=lzma.open(B/f'{n}.jsonl.xz').read(); k=4; s=-(-len(d)//k)
    jobs+=[(n,i,d[i*s:(i+1)*s]) for i in range(k)]
with ProcessPoolExecutor(2) as p: print(sum(p.map(one,jobs)))
