# shellcheck shell=bash
# Shared by the run scripts; sourced, never run. After `source`, the working directory is the repository's root.

CALLER="$PWD"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT" || exit

say() { printf '%s\n' "$*"; }

die() { # die MESSAGE [EXIT_CODE]
    printf 'error: %s\n' "$1" >&2
    exit "${2:-1}"
}

# No pipe: with pipefail, `grep -q` closing it early would look like no GPU.
has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && [[ "$(nvidia-smi -L 2>/dev/null)" == "GPU "* ]]; }

count_gpus() { nvidia-smi -L | grep -c '^GPU'; }

# A path that exists in the caller's folder, made absolute; anything else (a hub id) unchanged.
from_caller() { if [ -n "$1" ] && [ -e "$CALLER/$1" ]; then (cd "$CALLER" && realpath "$1"); else printf '%s' "$1"; fi; }

absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s' "$ROOT/$1" ;; esac; }

# The comment at the top of the script that runs.
print_help() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; }

# Checks of an option and its value, for a `case` over "$1".
need_value() { if [ "$#" -lt 2 ] || [ -z "$2" ]; then die "$1 needs a value (see --help)" 2; fi; }

is_count() { [[ "$2" =~ ^[1-9][0-9]*$ ]] || die "$1 is '$2'; it must be a positive number" 2; }

one_of() { # one_of OPTION VALUE ALLOWED "A, B or C"
    [[ " $3 " == *" $2 "* ]] || die "$1 is '$2'; it must be $4" 2
}

# The profile: GCPO_PROFILE, else by the machine.
choose_profile() {
    if has_gpu; then prefer gpu "an NVIDIA GPU answers"; else prefer cpu "no NVIDIA GPU answers"; fi
    one_of GCPO_PROFILE "$GCPO_PROFILE" "cpu gpu" "cpu or gpu"
    # Two environments: the two vLLM packages own the same files.
    VENV="$ROOT/.venv"
    [ "$GCPO_PROFILE" = cpu ] || VENV="$ROOT/.venv-gpu"
    VENV="${GCPO_VENV:-$VENV}"
    PY="$VENV/bin/python"
}

prefer() { # prefer PROFILE REASON; GCPO_PROFILE of the environment wins
    : "${GCPO_PROFILE_REASON:=${GCPO_PROFILE:+GCPO_PROFILE says so}}"
    : "${GCPO_PROFILE:=$1}" "${GCPO_PROFILE_REASON:=$2}"
    export GCPO_PROFILE GCPO_PROFILE_REASON
}

prefer_cpu() { prefer cpu "$1"; } # for programs that run on the CPU although there is a GPU

# Installs what is not installed yet and sets PY to the environment's interpreter.
ensure_environment() {
    choose_profile
    if [ "${GCPO_SKIP_SETUP:-}" = 1 ]; then
        [ -x "$PY" ] || PY=python
    else
        bash "$ROOT/run_scripts/setup.sh"
    fi
    if [ "$GCPO_PROFILE" = cpu ]; then
        # Several processes share few cores, and the first torch.compile costs more than it saves in so short a run.
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
        export TORCHDYNAMO_DISABLE="${TORCHDYNAMO_DISABLE:-1}"
        # Without this verl takes the GPU that it sees.
        if has_gpu; then export VERL_PLATFORM="${VERL_PLATFORM:-cpu}"; fi
    fi
}
