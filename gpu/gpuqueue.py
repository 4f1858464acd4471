"""Runs jobs.tsv: name, gpu (0, 1, any, cpu), slots of 6, after (names or -), limit in s, command."""
import json, os, subprocess, time, pathlib, signal, sys
Q = pathlib.Path("/tmp/q"); Q.mkdir(exist_ok=True)
N = int(os.environ.get("NGPU", "2"))
running, done = {}, {}
begun = time.time()
def jobs():
    rows = []
    for line in open("/tmp/q/jobs.tsv"):
        line = line.rstrip("\n")
        if line and not line.startswith("#"):
            name, gpu, slots, after, limit, command = line.split("\t")
            rows.append((name, gpu, int(slots), [a for a in after.split(",") if a != "-"], int(limit), command))
    return rows
while True:
    for name in list(running):
        process, gpu, slots, started, limit = running[name]
        rc = process.poll()
        if rc is None and time.time() - started > limit:
            os.killpg(process.pid, signal.SIGKILL); process.wait(); rc = "limit"
        if rc is not None:
            done[name] = {"rc": rc, "s": round(time.time() - started), "at": round(time.time() - begun), "gpu": gpu}
            del running[name]
    free = {str(i): 6 - sum(r[2] for r in running.values() if r[1] == str(i)) for i in range(N)}
    free["cpu"] = 99
    blocked = set()
    try: rows = jobs()
    except Exception as e: print("jobs", e, flush=True); rows = []
    for name, gpu, slots, after, limit, command in rows:
        if name in running or name in done: continue
        if pathlib.Path(f"/tmp/q/skip/{name}").exists(): continue
        if any(a not in done and not pathlib.Path(a).exists() for a in after): continue
        want = [str(i) for i in range(N)] if gpu == "any" else [gpu if gpu == "cpu" or int(gpu) < N else "0"]
        want = sorted((g for g in want if g not in blocked), key=lambda g: -free[g])
        if not want: continue
        if free[want[0]] < slots:
            if gpu != "any": blocked.add(want[0])
            continue
        g = want[0]; free[g] -= slots
        folder = Q / name; folder.mkdir(exist_ok=True)
        env = dict(os.environ, OUT=str(folder), XLA_PYTHON_CLIENT_PREALLOCATE="false", PYTHONUNBUFFERED="1")
        if g != "cpu": env["CUDA_VISIBLE_DEVICES"] = g
        else: env["JAX_PLATFORMS"] = "cpu"
        process = subprocess.Popen(["bash", "-c", command], stdout=open(folder / "log", "w"), stderr=subprocess.STDOUT, cwd="/tmp/src", env=env, start_new_session=True)
        running[name] = (process, g, slots, time.time(), limit)
    json.dump({"t": round(time.time() - begun), "running": {n: [r[1], round(time.time() - r[3])] for n, r in running.items()}, "done": done}, open(Q / "state.json", "w"))
    time.sleep(0.5)
