#!/bin/bash
# A whole hit at 1,000,000 and 1,024 tokens with the old kernel and variants of the new one, one process.
HERE=$(cd "$(dirname "$0")" && pwd)
export PYTHONUNBUFFERED=1
timeout 95 ${PYTHON:-python3} "$HERE/hit.py" ${MORE:---seconds=88}
echo "rc $?"
