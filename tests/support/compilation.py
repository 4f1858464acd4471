"""XLA's flags for quick compilation at the cost of slower programs, of which tests run small ones. Without JAX."""

import importlib.metadata


def quick_flags() -> str:
    """The flags that the installed JAX knows; an unknown one would be fatal.

    Level 0 halves the time LLVM takes, and doing without the fusion emitters, whose passes take longer than their code,
    again halves the rest. No result changes that a test could see.
    """
    emitters = " --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jax") < "0.11" else ""
    return f"--xla_backend_optimization_level=0{emitters}"
