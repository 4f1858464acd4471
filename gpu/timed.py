"""timed.py MODULE ARGS: runs a benchmark whose timed parts hold the GPU alone; compilations run side by side."""
import os, runpy, sys
sys.path[:0] = [os.getcwd(), os.path.dirname(os.path.abspath(__file__))]
from alone import alone
module, sys.argv = sys.argv[1], sys.argv[1:]
if module == "benchmarks.training":
    import benchmarks.training as t
    inner = t.measure if hasattr(t, "measure") else None
    holds = []
    old = t._bytes
    def _bytes(compiled):
        out = old(compiled)
        while holds: holds.pop().__exit__(None, None, None)
        hold = alone(); hold.__enter__(); holds.append(hold)
        return out
    t._bytes = _bytes
    t.define_config_flag()
    try: t.cli.run(t.main)
    finally:
        while holds: holds.pop().__exit__(None, None, None)
else:
    import benchmarks.timing as timing
    call_once, whole = timing._timed, timing.time_calls
    def time_calls(call, budget, *, prepare=None, least=3, compiled=False):
        if not compiled: call_once(call, prepare)
        with alone():
            return whole(call, budget, prepare=prepare, least=least, compiled=True)
    timing.time_calls = time_calls
    runpy.run_module(module, run_name="__main__", alter_sys=True)
