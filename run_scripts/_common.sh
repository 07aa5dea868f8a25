# shellcheck shell=bash
# What the run scripts share; sourced, never run. After `source`, the working directory is the repository's root.

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

count_gpus() { # count_gpus DEFAULT
    if has_gpu; then nvidia-smi -L | grep -c '^GPU'; else printf '%s' "$1"; fi
}

is_count() { [[ "$1" =~ ^[1-9][0-9]*$ ]]; }

# A path that exists from where the caller stands, made absolute; anything else (a hub id) unchanged.
from_caller() { if [ -n "$1" ] && [ -e "$CALLER/$1" ]; then (cd "$CALLER" && realpath "$1"); else printf '%s' "$1"; fi; }

absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s' "$ROOT/$1" ;; esac; }

# The comment at the top of the script that runs.
print_help() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; }

# The value of an option that needs one: need_value "$@" inside a `case` over "$1".
need_value() { if [ "$#" -lt 2 ] || [ -z "$2" ]; then die "$1 needs a value (see --help)" 2; fi; }

# Decides the profile once: what the caller says, else by the machine.
choose_profile() {
    if [ -n "${GCPO_PROFILE:-}" ]; then
        : "${GCPO_PROFILE_REASON:=GCPO_PROFILE says so}"
    elif has_gpu; then
        GCPO_PROFILE=gpu
        GCPO_PROFILE_REASON="an NVIDIA GPU answers"
    else
        GCPO_PROFILE=cpu
        GCPO_PROFILE_REASON="no NVIDIA GPU answers"
    fi
    export GCPO_PROFILE GCPO_PROFILE_REASON
    case "$GCPO_PROFILE" in
        cpu | gpu) ;;
        *) die "GCPO_PROFILE is '$GCPO_PROFILE'; it must be cpu or gpu" 2 ;;
    esac
    # Two environments: the two vLLM packages own the same files.
    case "$GCPO_PROFILE" in
        cpu) VENV="${GCPO_VENV:-$ROOT/.venv}" ;;
        gpu) VENV="${GCPO_VENV:-$ROOT/.venv-gpu}" ;;
    esac
    PY="$VENV/bin/python"
}

# For what runs on the CPU even where there is a GPU: the CPU profile, unless the caller says otherwise.
prefer_cpu() { # prefer_cpu REASON
    if [ -z "${GCPO_PROFILE:-}" ]; then
        GCPO_PROFILE=cpu
        GCPO_PROFILE_REASON="$1"
    fi
}

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
        export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
        # Without this verl takes the GPU that it sees.
        if has_gpu; then export VERL_PLATFORM="${VERL_PLATFORM:-cpu}"; fi
    fi
}
