# shellcheck shell=bash
# Functions that the scripts of this folder share; not to be run.

# Ends the script: a user's mistake is one line and status 2.
fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# Prints the comment at the head of a script: its help.
print_head() {
  sed -n '2,/^[^#]/{/^#SBATCH/q;/^#/!q;s/^# \{0,1\}//;p}' "$1"
}

# Runs a command; with dry_run=true only prints it, as one could type it.
run() {
  if [[ "${dry_run:-false}" == true ]]; then
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    printf '\n'
  else
    "$@"
  fi
}

# Checks that each of the first arguments, up to --, is given as NAME=VALUE among the others.
need() {
  local missing=() name argument
  while [[ "$1" != -- ]]; do
    name="$1"
    shift
    missing+=("$name")
    for argument in "${@}"; do
      if [[ "$argument" == "$name="?* ]]; then
        missing=("${missing[@]:0:${#missing[@]}-1}")
        break
      fi
    done
  done
  ((${#missing[@]} == 0)) || fail "${missing[0]}=...: missing; --help says what is needed"
}

# Sets `python`: $PYTHON, or that of the repository's environment; `root` is the repository.
find_python() {
  python="${PYTHON:-$root/.venv/bin/python}"
  command -v "$python" >/dev/null ||
    fail "PYTHON=$python: must be a Python that has tlinformer_jax; see README.md for an environment in .venv"
}
