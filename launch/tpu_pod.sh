#!/usr/bin/env bash
# Trains on a Cloud TPU slice with one or many hosts, using gcloud. Run it on your own machine, in a clone:
#
#   launch/tpu_pod.sh create --name=NAME --zone=ZONE --type=TYPE [--version=IMAGE] [--project=P] [--spot]
#   launch/tpu_pod.sh setup  --name=NAME --zone=ZONE [--nfs=SERVER:/SHARE]     # the committed files of this clone
#   launch/tpu_pod.sh run    --name=NAME --zone=ZONE -- --config=FILE --workdir=/mnt/runs/DIR [...]
#   launch/tpu_pod.sh resume --name=NAME --zone=ZONE --type=TYPE [...] -- --config=FILE --workdir=/mnt/runs/DIR [...]
#   launch/tpu_pod.sh delete --name=NAME --zone=ZONE
#
#   launch/tpu_pod.sh resume --name=tlin --zone=us-west4-a --type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot \
#     --nfs=10.0.0.2:/runs -- --config=configs/large.py:350m --workdir=/mnt/runs/350m
#
# - run: runs the training command on all workers at once; they find each other. The flags after -- go to the command.
# - resume: creates the slice if there is none, sets it up and runs. If the slice is preempted, it deletes the remains,
#   creates the slice again, and the run continues from its last checkpoint. It ends when the command ends, with the
#   command's status if that failed on a healthy slice.
# - --nfs mounts a share (for example Filestore) at /mnt/runs on every worker. Slices of several workers need one, and
#   so do slices that can be preempted: checkpoints must outlive the slice.
# - --version is the TPU's software image, v2-alpha-tpuv5-lite for v5e (the default), v2-alpha-tpuv6e for v6e;
#   --retry=SECONDS is the pause before resume asks again for an unavailable slice (60).
# - TLINFORMER_CACHE, if set here, is set for the training command too: the workers' folder for tokens and downloads.
# - --dry_run prints the commands and runs none.
#
# Needs bash 4.4 and gcloud, logged in, with a project and the TPU API. A slice costs money until it is deleted.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

MOUNT=/mnt/runs
FOLDER=tlinformer_jax  # in the home directory of every worker

command=""
dry_run=false
spot=false
name="" zone="" type="" project="" nfs=""
version=v2-alpha-tpuv5-lite
retry=60
arguments=()

read_flags() {
  while (($#)); do
    case "$1" in
      create | setup | run | resume | delete)
        [[ -z "$command" ]] || fail "$command $1: give one of create, setup, run, resume, delete"
        command="$1"
        ;;
      --name=?*) name="${1#*=}" ;;
      --zone=?*) zone="${1#*=}" ;;
      --type=?*) type="${1#*=}" ;;
      --version=?*) version="${1#*=}" ;;
      --project=?*) project="${1#*=}" ;;
      --nfs=?*) nfs="${1#*=}" ;;
      --retry=?*) retry="${1#*=}" ;;
      --spot) spot=true ;;
      --dry_run) dry_run=true ;;
      -h | --help)
        print_head "${BASH_SOURCE[0]}"
        exit 0
        ;;
      --)
        shift
        arguments=("$@")
        return
        ;;
      *) fail "$1: not known; the training command's own flags stand after --, and --help lists the others" ;;
    esac
    shift
  done
}

check_flags() {
  [[ -n "$command" ]] || fail "a command is missing: one of create, setup, run, resume, delete"
  [[ "$name" =~ ^[a-z][a-z0-9-]*$ ]] || fail "--name=$name: must be a name of small letters, digits and dashes"
  [[ -n "$zone" ]] || fail "--zone=...: missing, such as us-west4-a"
  [[ "$retry" =~ ^[0-9]+$ ]] || fail "--retry=$retry: must be a number of seconds"
  [[ -z "$nfs" || "$nfs" == ?*:/* ]] || fail "--nfs=$nfs: must be SERVER:/SHARE"
  case "$command" in
    create | resume) [[ -n "$type" ]] || fail "--type=...: missing, such as v5litepod-16" ;;
  esac
  case "$command" in
    run | resume) need --config --workdir -- "${arguments[@]}" ;;
    *) ((${#arguments[@]} == 0)) || fail "$command: takes nothing after --" ;;
  esac
}

# gcloud compute tpus tpu-vm COMMAND ..., in the zone.
tpu() {
  local settings=(--zone="$zone" --quiet)
  [[ -z "$project" ]] || settings+=(--project="$project")
  run gcloud compute tpus tpu-vm "$@" "${settings[@]}"
}

on_all_workers() {
  tpu ssh "$name" --worker=all --command="$1"
}

create() {
  local settings=(--accelerator-type="$type" --version="$version")
  [[ "$spot" == false ]] || settings+=(--spot)
  tpu create "$name" "${settings[@]}"
}

# The images' own Python may be older than what we need, so uv brings one.
setup() {
  local folder steps status=0
  folder="$(mktemp -d)"
  run git -C "$root" archive --format=tar.gz --output="$folder/$FOLDER.tar.gz" HEAD &&
    tpu scp "$folder/$FOLDER.tar.gz" "$name:" --worker=all || status=$?
  rm -rf "$folder"
  ((status == 0)) || return "$status"
  steps="set -e; mkdir -p $FOLDER; tar -xzf $FOLDER.tar.gz -C $FOLDER; cd $FOLDER; python3 -m pip install -q --user uv"
  steps+="; [ -x .venv/bin/python ] || python3 -m uv venv -q --python 3.12 .venv"
  steps+="; python3 -m uv pip install -q --python .venv/bin/python -e '.[tpu,data]'"
  if [[ -n "$nfs" ]]; then
    steps+="; mountpoint -q $MOUNT || { sudo apt-get install -y -qq nfs-common; sudo mkdir -p $MOUNT"
    steps+="; sudo mount -t nfs $nfs $MOUNT; sudo chmod a+rwx $MOUNT; }"
  fi
  on_all_workers "$steps"
}

train() {
  local variables=""
  [[ -z "${TLINFORMER_CACHE:-}" ]] || variables="TLINFORMER_CACHE=$(printf '%q' "$TLINFORMER_CACHE") "
  on_all_workers "cd $FOLDER && ${variables}exec .venv/bin/python -m tlinformer_jax.main$(printf ' %q' "${arguments[@]}")"
}

delete() {
  tpu delete "$name"
}

# Prints READY, PREEMPTED and the like; NONE where there is no such slice.
state() {
  if [[ "$dry_run" == true ]]; then
    tpu describe "$name" --format='value(state)' >&2
    echo NONE
  else
    tpu describe "$name" --format='value(state)' 2>/dev/null || echo NONE
  fi
}

resume() {
  local status
  while :; do
    case "$(state)" in
      READY) ;;
      NONE) create || { pause; continue; } ;;
      CREATING | STARTING | RESTARTING | REPAIRING | DELETING) pause; continue ;;
      *)  # PREEMPTED, TERMINATED, STOPPED: of no more use
        delete || true
        continue
        ;;
    esac
    status=0
    { setup && train; } || status=$?
    ((status != 0)) || return 0
    [[ "$(state)" != READY ]] || return "$status"
    echo "the slice $name was taken away; getting it back" >&2
  done
}

pause() {
  echo "waiting $retry s for $name" >&2
  sleep "$retry"
}

read_flags "$@"
check_flags
[[ "$dry_run" == true ]] || command -v gcloud >/dev/null || fail "gcloud: not found; install the Google Cloud CLI"
case "$command" in
  run) train ;;
  *) "$command" ;;
esac
