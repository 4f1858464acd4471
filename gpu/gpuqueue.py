"""Runs jobs.tsv: name, pool (0, 1: trains on that GPU; t: timing on the last GPU; cpu), slots, after (names or paths), limit in s, command."""
import json, os, subprocess, time, pathlib, signal
Q = pathlib.Path("/tmp/q"); Q.mkdir(exist_ok=True)
LAST = int(os.environ["NGPU"]) - 1
GPU = {"0": 0, "1": LAST, "t": LAST, "cpu": -1}
SIZES = {"0": 10, "1": 9, "t": 3, "cpu": 99}
running, done, held = {}, {}, {0: 0.0, LAST: 0.0, -1: 0.0}
begun = last = time.time()
def jobs():
    if (Q / "sizes.json").exists(): SIZES.update(json.load(open(Q / "sizes.json")))
    rows = []
    for line in open("/tmp/q/jobs.tsv"):
        line = line.rstrip("\n")
        if line and not line.startswith("#"):
            name, pool, slots, after, limit, command = line.split("\t")
            rows.append((name, pool, int(slots), [a for a in after.split(",") if a != "-"], int(limit), command))
    return rows
def thaw(gpu):
    for p, pool, *_ in running.values():
        if GPU[pool] != gpu: continue
        for d in os.listdir("/proc"):
            if d.isdigit():
                try:
                    t = open(f"/proc/{d}/stat").read(); g = int(t[t.rindex(")") + 2:].split()[2])
                    if g == p.pid: os.kill(int(d), signal.SIGCONT)
                except (OSError, ValueError): pass
while True:
    now = time.time()
    marks = {g: Q / f"alone{g}" for g in {0, LAST}}
    for g, mark in marks.items():
        if mark.exists():
            held[g] += now - last
            try: alive = os.path.exists(f"/proc/{int(mark.read_text() or 0)}")
            except (ValueError, OSError): alive = True
            if not alive: mark.unlink(missing_ok=True); thaw(g)
    last = now
    for name in list(running):
        process, pool, slots, started, limit, held0 = running[name]
        rc = process.poll()
        if rc is None and now - started - (held[GPU[pool]] - held0) > limit:
            os.killpg(process.pid, signal.SIGKILL); process.wait(); rc = "limit"
        if rc is not None:
            done[name] = {"rc": rc, "s": round(now - started), "at": round(now - begun), "held": round(held[GPU[pool]] - held0)}
            del running[name]
    try: rows = jobs()
    except Exception as e: print("jobs", e, flush=True); rows = []
    free = {p: s - sum(r[2] for r in running.values() if r[1] == p) for p, s in SIZES.items()}
    blocked = set()
    for name, pool, slots, after, limit, command in rows:
        gpu = GPU[pool]
        if gpu >= 0 and marks[gpu].exists(): continue
        if name in running or name in done or (Q / "skip" / name).exists(): continue
        if any(a not in done and not pathlib.Path(a).exists() for a in after): continue
        if pool in blocked: continue
        if free[pool] < slots: blocked.add(pool); continue
        free[pool] -= slots
        folder = Q / name; folder.mkdir(exist_ok=True)
        env = dict(os.environ, OUT=str(folder), XLA_PYTHON_CLIENT_PREALLOCATE="false", PYTHONUNBUFFERED="1")
        if pool == "cpu": env["JAX_PLATFORMS"] = "cpu"
        else: env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        if pool == "0" and (Q / "mps_ok").exists(): env["CUDA_MPS_PIPE_DIRECTORY"] = "/tmp/mps"
        process = subprocess.Popen(["bash", "-c", command], stdout=open(folder / "log", "w"), stderr=subprocess.STDOUT, cwd="/tmp/src", env=env, start_new_session=True)
        running[name] = (process, pool, slots, time.time(), limit, held[gpu])
    for g in {0, LAST}:
        (Q / f"groups{g}").write_text(" ".join(str(r[0].pid) for r in running.values() if GPU[r[1]] == g))
    json.dump({"t": round(now - begun), "held": held, "running": {n: [r[1], round(now - r[3])] for n, r in running.items()}, "done": done}, open(Q / "state.json", "w"))
    time.sleep(0.3)
