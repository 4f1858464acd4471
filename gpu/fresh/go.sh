# README's two commands on fresh clones of BRANCH
ln -sfn /work/shared /tmp/shared; rm -rf /tmp/fr1 /tmp/fr2 /tmp/fr_home; mkdir -p /tmp/fr_home
for n in 1 2; do git clone -q -b $1 /work/main /tmp/fr$n; done
run() { env -u PYTHONPATH -u JAX_COMPILATION_CACHE_DIR HOME=/tmp/fr_home PATH=/root/.pyenv/shims:/root/.pyenv/bin:/usr/local/bin:/usr/bin:/bin bash -c "$1"; }
cd /tmp/fr1; git log --oneline | head -1; c=$(grep -m1 -A3 '^```bash' README.md | grep venv); (time run "$c") 2>&1 | tail -12
cd /tmp/fr2; t=$(grep -A2 'test command' README.md | grep venv); echo "$t"; (time run "$t") 2>&1 | tail -8
