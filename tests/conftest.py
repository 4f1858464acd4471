"""Test-wide settings: eight simulated CPU devices, float32 products, a persistent compilation cache."""

import os
import pathlib

ON_GPU = os.environ.get("JAX_PLATFORMS", "cpu") not in ("", "cpu")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if not ON_GPU:
    # Level 0 halves the time LLVM takes; it changes no result that a test could see.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    ).strip()

import jax  # noqa: E402  (reads the environment set above)

CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache"
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
