#!/usr/bin/env bash
# Trains on one machine with NVIDIA GPUs: one process uses all visible GPUs.
#
#   launch/gpu.sh [--dry_run] [--gpus=0,1] --config=FILE --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
#
#   launch/gpu.sh --config=configs/wt103.py --workdir=runs/wt103
#   launch/gpu.sh --gpus=0,1 --config=configs/wt103.py --config.train.mesh=fsdp=2 --workdir=runs/two
#
# --gpus selects GPUs by number; --dry_run prints the commands and runs none. All other flags go to
# `python -m tlinformer_jax.main` (--helpshort lists them); with --check, which writes nothing, --workdir may be left out.
# config.train.mesh says how the GPUs share the work; by default they split the batch. Ctrl-C or SIGTERM saves and ends
# with status 0; the same command continues from there.
#
# Needs an environment with JAX for CUDA. Set it up once, in the repository:
#   python3 -m venv .venv && .venv/bin/pip install -e '.[cuda13]'    # or cuda12
# PYTHON=... names another Python. XLA_PYTHON_CLIENT_MEM_FRACTION is the share of GPU memory that JAX takes (0.92 here).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

dry_run=false
gpus=""
needed=(--config --workdir)
arguments=()
for argument in "$@"; do
  case "$argument" in
    --dry_run) dry_run=true ;;
    --gpus=*) gpus="${argument#*=}" ;;
    -h | --help)
      print_head "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --check | --check_compile)  # writes nothing
      needed=(--config)
      arguments+=("$argument")
      ;;
    *) arguments+=("$argument") ;;
  esac
done
if [[ -n "$gpus" && ! "$gpus" =~ ^[0-9]+(,[0-9]+)*$ ]]; then
  fail "--gpus=$gpus: must be numbers of GPUs, separated by commas"
fi
need "${needed[@]}" -- "${arguments[@]}"
find_python
if [[ "$dry_run" == false ]] && ! nvidia-smi --list-gpus >/dev/null 2>&1; then
  fail "nvidia-smi lists no GPU: this script is for machines with NVIDIA GPUs"
fi

settings=("JAX_PLATFORMS=cuda" "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}")
[[ -z "$gpus" ]] || settings+=("CUDA_VISIBLE_DEVICES=$gpus")
line=(env "${settings[@]}" "$python" -m tlinformer_jax.main --num_processes=1 "${arguments[@]}")
if [[ "$dry_run" == true ]]; then
  dry_run=true run "${line[@]}"
else
  exec "${line[@]}"
fi
