"""Runs jobs.tsv: name, pool (g: any GPU; 0..3: that GPU; t: timing, alone on the last GPU; cpu), slots, after (names or paths), limit in s, command."""
import json, os, subprocess, time, pathlib, signal
Q = pathlib.Path("/tmp/q"); Q.mkdir(exist_ok=True)
NGPU = int(os.environ["NGPU"]); LAST = NGPU - 1
SIZES = {**{str(g): 12 for g in range(NGPU)}, "t": 1, "cpu": 99}
running, done, held = {}, {}, {g: 0.0 for g in (*range(NGPU), -1)}
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
    for p, g, *_ in running.values():
        if g != gpu: continue
        for d in os.listdir("/proc"):
            if d.isdigit():
                try:
                    t = open(f"/proc/{d}/stat").read(); group = int(t[t.rindex(")") + 2:].split()[2])
                    if group == p.pid: os.kill(int(d), signal.SIGCONT)
                except (OSError, ValueError): pass
while True:
    now = time.time()
    marks = {g: Q / f"alone{g}" for g in range(NGPU)}
    for g, mark in marks.items():
        if mark.exists():
            held[g] += now - last
            try: alive = os.path.exists(f"/proc/{int(mark.read_text() or 0)}")
            except (ValueError, OSError): alive = True
            if not alive: mark.unlink(missing_ok=True); thaw(g)
    last = now
    for name in list(running):
        process, gpu, slots, started, limit, held0, pool = running[name]
        rc = process.poll()
        if (Q / "kill" / name).exists() and rc is None:
            os.killpg(process.pid, signal.SIGKILL); process.wait(); rc = "killed"
        if rc is None and now - started - (held[gpu] - held0) > limit:
            os.killpg(process.pid, signal.SIGKILL); process.wait(); rc = "limit"
        if rc is not None:
            done[name] = {"rc": rc, "s": round(now - started), "at": round(now - begun), "gpu": gpu, "held": round(held[gpu] - held0)}
            del running[name]
    try: rows = jobs()
    except Exception as e: print("jobs", e, flush=True); rows = []
    free = {g: SIZES[str(g)] - sum(r[2] for r in running.values() if r[1] == g and r[6] != "t") for g in range(NGPU)}
    timing = sum(r[6] == "t" for r in running.values())
    blocked = set()
    for name, pool, slots, after, limit, command in rows:
        if name in running or name in done or (Q / "skip" / name).exists(): continue
        if any(a not in done and not pathlib.Path(a).exists() for a in after): continue
        if pool == "cpu": gpu = -1
        elif pool == "t":
            if timing >= SIZES["t"]: continue
            timing += 1; gpu = LAST
        else:
            if pool in blocked: continue
            choices = [g for g in ([int(pool)] if pool != "g" else range(NGPU)) if not marks[g].exists()]
            gpu = max(choices, key=lambda g: free[g], default=None)
            if gpu is None or free[gpu] < slots: blocked.add(pool); continue
            free[gpu] -= slots
        folder = Q / name; folder.mkdir(exist_ok=True)
        env = dict(os.environ, OUT=str(folder), XLA_PYTHON_CLIENT_PREALLOCATE="false", PYTHONUNBUFFERED="1")
        if pool == "cpu": env["JAX_PLATFORMS"] = "cpu"
        else: env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        process = subprocess.Popen(["bash", "-c", command], stdout=open(folder / "log", "w"), stderr=subprocess.STDOUT, cwd="/tmp/src", env=env, start_new_session=True)
        running[name] = (process, gpu, slots, time.time(), limit, held[gpu], pool)
    for g in range(NGPU):
        (Q / f"groups{g}").write_text(" ".join(str(r[0].pid) for r in running.values() if r[1] == g))
    json.dump({"t": round(now - begun), "free": free, "held": held, "running": {n: [r[1], round(now - r[3])] for n, r in running.items()}, "done": done}, open(Q / "state.json", "w"))
    time.sleep(0.3)
