#!/bin/bash
# Designs of the kernel that reads an int8 history for a token (issue 27, item 6).
HERE=$(cd "$(dirname "$0")" && pwd)
export PYTHONUNBUFFERED=1
timeout 95 ${PYTHON:-python3} "$HERE/micro.py" --seconds=82
echo "rc $?"
