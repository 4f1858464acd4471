export PATH=/work/venv/bin:$PATH JAX_COMPILATION_CACHE_DIR=/work/jax_cache; unset PYTHONDONTWRITEBYTECODE; export PYTHONPATH=${CO:-/work/main}
