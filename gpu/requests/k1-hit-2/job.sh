#!/bin/bash
# A whole hit with the old kernel and variants of the new one, 1,000,000, 100,000 and 1,024 tokens.
HERE=$(cd "$(dirname "$0")" && pwd)
export PYTHONUNBUFFERED=1
timeout 98 ${PYTHON:-python3} "$HERE/hit2.py" ${MORE:---seconds=90}
echo "rc $?"
