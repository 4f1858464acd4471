# first call: packages, a copy of the tree, the queue
set -e
mkdir -p /tmp/src /tmp/data /tmp/q /tmp/carry /tmp/results
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site .whl/ml_*.whl .whl/tensor*.whl .whl/gpt3*.whl .whl/bzip3*.whl

cp -r benchmarks configs tlinformer_jax tools tests pyproject.toml docs launch /tmp/src/
ln -sfn /tmp/data /tmp/src/books
bash .carry/fetch.sh
nvidia-smi -L; nproc
cd /tmp/src
export PYTHONPATH=/tmp/src:/tmp/site TLINFORMER_CACHE=/tmp/cache JAX_COMPILATION_CACHE_DIR=/tmp/jc NGPU=$(nvidia-smi -L | wc -l)
setsid python3 /tmp/carry/gpuqueue.py > /tmp/q/queue.log 2>&1 < /dev/null &
true
sleep 1
