"""`with alone():` holds the GPU alone: one holder at a time, every other job's processes are stopped meanwhile."""
import contextlib, fcntl, os, pathlib, signal, time
Q = pathlib.Path("/tmp/q"); GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0"); MARK = Q / f"alone{GPU}"
def _stat(pid):
    text = open(f"/proc/{pid}/stat").read(); rest = text[text.rindex(")") + 2:].split()
    return int(rest[1]), int(rest[2])  # parent, group
def others(keep_group=False):
    groups = {int(g) for g in (Q / f"groups{GPU}").read_text().split()} if (Q / f"groups{GPU}").exists() else set()
    keep, pid = {os.getpid()}, os.getpid()
    if keep_group: groups.discard(os.getpgid(0))
    while pid > 1:
        pid, _ = _stat(pid); keep.add(pid)
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in keep:
            try:
                parent, group = _stat(name)
            except (OSError, ValueError): continue
            if group in groups and parent != os.getpid(): found.append(int(name))
    return found
def send(pids, what):
    for pid in pids:
        try: os.kill(pid, what)
        except OSError: pass
def drain(settle):
    """Waits until what the stopped processes had queued is done."""
    time.sleep(settle)
    try:
        import pynvml
        pynvml.nvmlInit(); handle = pynvml.nvmlDeviceGetHandleByIndex(int(GPU))
        for _ in range(40):
            if pynvml.nvmlDeviceGetUtilizationRates(handle).gpu == 0: return
            time.sleep(0.15)
    except Exception as error: print("drain", error, flush=True); time.sleep(2)
@contextlib.contextmanager
def alone(settle=0.4, keep_group=False):
    with open(f"/tmp/gpulock{GPU}", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        pids = []
        try:
            MARK.write_text(str(os.getpid()))
            pids = others(keep_group); send(pids, signal.SIGSTOP); drain(settle)
            begun = time.time()
            yield
            with open(Q / "holds", "a") as log: log.write(f"{os.getpid()} {time.time() - begun:.2f} stopped {len(pids)}\n")
        finally:
            MARK.unlink(missing_ok=True); send(others() + pids, signal.SIGCONT)
            fcntl.flock(file, fcntl.LOCK_UN)
