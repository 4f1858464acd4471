# the same for GPU 1, which its clients see as device 0
P=$(command -v nvidia-cuda-mps-control || ls /usr/local/nvidia/bin/nvidia-cuda-mps-control 2>/dev/null | head -1)
mkdir -p /tmp/mps1 /tmp/mpslog1
export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps1 CUDA_MPS_LOG_DIRECTORY=/tmp/mpslog1
CUDA_VISIBLE_DEVICES=1 $P -d
timeout 45 env CUDA_VISIBLE_DEVICES=0 XLA_PYTHON_CLIENT_PREALLOCATE=false python3 -c "import jax; print(jax.devices(), float((jax.numpy.ones((512,512)) @ jax.numpy.ones((512,512))).sum()))" && touch /tmp/q/mps1_ok
tail -5 /tmp/mpslog1/*.log
nvidia-smi --query-compute-apps=pid,gpu_uuid,used_memory --format=csv,noheader | head -40
touch /tmp/q/probed1
