"""timed.py MODULE ARGS: runs a benchmark whose timed parts hold the GPU alone; compilations run side by side."""
import fcntl, os, runpy, sys, contextlib
sys.path.insert(0, os.getcwd())
FILE = open("/tmp/gpulock" + os.environ.get("CUDA_VISIBLE_DEVICES", ""), "w")
def shared():
    if not os.environ.get('NOLOCK'): fcntl.flock(FILE, fcntl.LOCK_SH)
def alone(): fcntl.flock(FILE, fcntl.LOCK_UN); fcntl.flock(FILE, fcntl.LOCK_EX)
shared()
module, sys.argv = sys.argv[1], sys.argv[1:]
if module == "benchmarks.training":
    import benchmarks.training as t
    inner = t._bytes
    def _bytes(compiled):
        alone(); return inner(compiled)
    t._bytes = _bytes
    t.define_config_flag(); t.cli.run(t.main)
else:
    import benchmarks.timing as timing
    call_once, whole = timing._timed, timing.time_calls
    def time_calls(call, budget, *, prepare=None, least=3, compiled=False):
        if not compiled: call_once(call, prepare)
        alone()
        try: return whole(call, budget, prepare=prepare, least=least, compiled=True)
        finally: fcntl.flock(FILE, fcntl.LOCK_UN); shared()
    timing.time_calls = time_calls
    runpy.run_module(module, run_name="__main__", alter_sys=True)
