#!/usr/bin/env bash
# Evaluates a model or a checkpoint: vLLM samples, the reward of training grades, and the paper's table is printed.
# Every sample is kept; run it again with the same arguments and it goes on where it was stopped.
#
#   bash run_scripts/evaluate.sh MODEL [options]
#   bash run_scripts/evaluate.sh table [--format terminal|markdown|csv] RUN... | NAME=RUN...
#
#   MODEL              folder of a model, checkpoint (.../global_step_N), or name on the hub
#   --sets A,B,...     aime24, aime25, amc23, math500, minerva (default: these five), humaneval, humaneval_5shot,
#                      mbpp_test, gsm8k, arithmetic, or parquet files in verl's schema; `python -m data_prep SET`
#                      prepares a set
#   --samples K        of a question (default 16)
#   --temperature T    default 0.6; 0 is greedy and takes --samples 1
#   --top-p P          default 0.95
#   --max-tokens N     of a response (default 16384)
#   --seed N           default 0
#   --aggregate K      put K samples of a question into a prompt, as training does, and answer again; then settings of
#                      training may follow: gcpo.blocks.max_tokens=512
#   --limit N          the first N questions of every set
#   --gpus N           that the model is spread over (default 1)
#   --sandbox NAME     for programs: auto (default), bubblewrap or fusion, which needs
#   --sandbox-fusion-url URL
#   --output DIR       default outputs/evaluation/NAME_OF_THE_MODEL
#   RUN                the --output of an evaluation; differences are to the first one
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

# Sets or files with commas between them, each file found from where the caller stands.
sets_from_caller() {
    local found=() name
    IFS=, read -ra names <<< "$1"
    for name in "${names[@]}"; do found+=("$(from_caller "$name")"); done
    (IFS=,; printf '%s' "${found[*]}")
}

MODEL=""
ARGUMENTS=()
if [ "${1:-}" = table ]; then
    MODEL=none
    ARGUMENTS=(table)
    shift
fi
while [ "$#" -gt 0 ]; do
    case "$1" in
        -h | --help) print_help; exit 0 ;;
        --sets) need_value "$@"; ARGUMENTS+=("$1" "$(sets_from_caller "$2")"); shift 2 ;;
        --output) need_value "$@"; ARGUMENTS+=("$1" "$(absolute "${2%/}")"); shift 2 ;;
        --samples | --temperature | --top-p | --max-tokens | --seed | --aggregate | --limit | --gpus | --format | --sandbox | --sandbox-fusion-url)
            need_value "$@"
            ARGUMENTS+=("$1=$2")
            shift 2
            ;;
        -*) die "unknown option $1 (see --help)" 2 ;;
        *=*) ARGUMENTS+=("${1%%=*}=$(from_caller "${1#*=}")"); shift ;;
        *) MODEL="$1"; ARGUMENTS+=("$(from_caller "$1")"); shift ;;
    esac
done
[ -n "$MODEL" ] || die "which model? give a folder, a checkpoint or a name on the hub (see --help)" 2

ensure_environment
exec "$PY" -m gcpo.tools.evaluate "${ARGUMENTS[@]}"
