"""XLA's flags for quick compilation at the cost of slower programs, of which tests run small ones. Without JAX."""

import importlib.metadata


def quick_flags(many_steps: bool = False) -> str:
    """The flags that the installed JAX knows; an unknown one would be fatal.

    Level 0 halves LLVM's time. XLA's fusion emitters take as long as all else together; the older way of making code
    for fusions does not. Parts that are compiled in parallel take a quarter more of the processor than one whole, and
    the workers keep every core busy. No result changes that a test could see. With `many_steps` level 1, which is for
    programs that run hundreds of times: they take half as long.
    """
    version = tuple(int(part) for part in importlib.metadata.version("jax").split(".")[:2])
    emitters = " --xla_cpu_use_fusion_emitters=false" if version < (0, 11) else ""
    parts = " --xla_cpu_parallel_codegen_split_count=1" if version < (0, 12) else ""
    return f"--xla_backend_optimization_level={int(many_steps)}{emitters}{parts}"
