import sys; sys.path.insert(0, '/tmp/site')
import bz3, pathlib, subprocess
from concurrent.futures import ProcessPoolExecutor
D = pathlib.Path('/tmp/data'); NAMES = ['train-00000-of-00003', 'train-00001-of-00003', 'train-rest']
def text(part): return bz3.decompress(part.read_bytes())
if __name__ == '__main__':
    parts = [sorted(D.glob(f'{n}.*.bz3')) for n in NAMES]
    assert [len(p) for p in parts] == [4, 4, 4], parts
    with ProcessPoolExecutor(12) as pool:
        texts = list(pool.map(text, [p for ps in parts for p in ps]))
    total = 0; running = []
    for i, n in enumerate(NAMES):
        out = open(D / f'{n}.part', 'wb'); p = subprocess.Popen(['xz', '-0', '-T8', '-c'], stdin=subprocess.PIPE, stdout=out)
        running.append((n, p))
    from threading import Thread
    def feed(p, ts):
        for t in ts: p.stdin.write(t)
        p.stdin.close(); p.wait()
    threads = [Thread(target=feed, args=(p, texts[4*i:4*i+4])) for i, (n, p) in enumerate(running)]
    [t.start() for t in threads]; [t.join() for t in threads]
    for n, p in running:
        assert p.returncode == 0; (D / f'{n}.part').rename(D / f'{n}.jsonl.xz')
    print(sum(map(len, texts)))
