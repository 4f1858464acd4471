# shellcheck shell=bash
# Functions that the job scripts of this folder share; not to be run. Needs `root` and ../common.sh.

# Runs a module as a step of this job. When SLURM says that the time is nearly over (USR1, see --signal in the job
# scripts), the step is told to save and end, and the job is put into the queue again. When SLURM takes the nodes for
# another job it tells the step itself, and requeues the job where --requeue is set.
run_step() {
  local step status=0 timed_out=false
  if [[ "${dry_run:-false}" == true ]]; then
    run srun --kill-on-bad-exit=1 "$@"
    return
  fi
  [[ -n "${SLURM_JOB_ID:-}" ]] || fail "SLURM_JOB_ID is not set: submit this script with sbatch; --dry_run only prints"
  # Since 22.05 srun no longer takes this from the job.
  [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
  trap 'timed_out=true; trap "" USR1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1  # goes to the steps only
  trap 'trap "" TERM' TERM  # this shell outlives the step
  srun --kill-on-bad-exit=1 "$@" &
  step=$!
  wait "$step" || status=$?
  while kill -0 "$step" 2>/dev/null; do  # a signal ended the wait, not the step
    status=0
    wait "$step" || status=$?
  done
  if [[ "$timed_out" == true ]]; then
    echo "the time of job $SLURM_JOB_ID is nearly over: into the queue again"
    scontrol requeue "$SLURM_JOB_ID"
    return
  fi
  return "$status"
}

# Reads the script's arguments into `arguments` and `dry_run`, with the help in file $1.
read_arguments() {
  local head="$1" argument
  shift
  dry_run=false
  arguments=()
  for argument in "$@"; do
    case "$argument" in
      --dry_run) dry_run=true ;;
      -h | --help)
        print_head "$head"
        exit 0
        ;;
      *) arguments+=("$argument") ;;
    esac
  done
}
