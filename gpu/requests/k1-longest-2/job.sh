#!/bin/bash
# The longest text that fits, int8 cache. LENGTH is the number of tokens of the prompt; 256 more follow.
LENGTH=${LENGTH:-76000000}
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv 2>/dev/null
date -u
# --seconds is the budget of the three ceilings alone.
timeout 150 ${PYTHON:-python3} -m benchmarks.inference --parts=longest --longest=$LENGTH --architectures=tlinformer \
    --cache_dtype=int8 --seconds=0.1 --out="$OUT" ${MORE:-}
echo "rc $?"
date -u
