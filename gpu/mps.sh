# several processes at once on GPU 0, if the image has CUDA's service for it; otherwise they take turns
P=$(command -v nvidia-cuda-mps-control || ls /usr/local/nvidia/bin/nvidia-cuda-mps-control /usr/bin/nvidia-cuda-mps-control 2>/dev/null | head -1)
echo "control: $P"
if [ -n "$P" ] && [ "$NGPU" -gt 1 ]; then
  export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mpslog CUDA_VISIBLE_DEVICES=0
  PATH=$PATH:$(dirname $P) $P -d
  timeout 45 env XLA_PYTHON_CLIENT_PREALLOCATE=false python3 -c "import jax; print(jax.devices(), float((jax.numpy.ones((512,512)) @ jax.numpy.ones((512,512))).sum()))" && touch /tmp/q/mps_ok
  cat /tmp/mpslog/*.log | tail -5
fi
touch /tmp/q/probed; [ "$NGPU" -gt 1 ] && bash /tmp/carry/mps1.sh; touch /tmp/q/probed1
