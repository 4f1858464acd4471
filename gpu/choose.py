"""Chooses each architecture's learning rate by the last validation loss of its three trial runs."""
import glob, json, pathlib
best = {}
for path in glob.glob("/tmp/q/results/books-*-lr*.json"):
    record = json.load(open(path)); name = pathlib.Path(path).stem.removeprefix("books-"); arch, rate = name.split("-lr")
    rate = rate.split("-seed")[0]
    loss = record["then"]["evaluate"]["figures"]["loss"]
    print(arch, rate, loss, record.get("history", [])[-1:])
    if arch not in best or loss < best[arch][0]: best[arch] = (loss, rate)
print(best)
for arch, (_, rate) in best.items(): pathlib.Path(f"/tmp/q/rate-of-{arch}").write_text(rate)
for arch in ("plain", "base", "sliding", "no-history"):
    p = pathlib.Path(f"/tmp/q/rate-of-{arch}")
    if not p.exists(): p.write_text("0.001"); print("no rate for", arch)
