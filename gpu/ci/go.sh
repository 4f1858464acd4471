# go.sh BRANCH: .ci/run on a fresh clone with a HOME of its own
rm -rf /tmp/ci_clone /tmp/ci_home; mkdir -p /tmp/ci_home; ln -sfn /work/shared /tmp/shared
git clone -q -b $1 /work/main /tmp/ci_clone; cd /tmp/ci_clone; git log --oneline | head -1
env -u PYTHONPATH -u JAX_COMPILATION_CACHE_DIR HOME=/tmp/ci_home PATH=/root/.pyenv/shims:/root/.pyenv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin CI=true bash -c 'time .ci/run' > /work/scratch/ci/log 2>&1; echo rc $? >> /work/scratch/ci/log
