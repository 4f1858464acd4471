#!/bin/bash
HERE=$(cd "$(dirname "$0")" && pwd)
export PYTHONUNBUFFERED=1
timeout 90 ${PYTHON:-python3} "$HERE/check.py" $MORE
echo "rc $?"
