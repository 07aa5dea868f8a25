#!/usr/bin/env bash
# Self-training with ReST-MCTS*: tree search, fine-tuning of the policy, regression of the value model, repeated.
# Run it again with the same arguments and it goes on where it was stopped.
#
#   bash run_scripts/rest_mcts.sh [CONFIG] [options] [settings, key=value ...]
#
#   CONFIG         a file of recipe/rest_mcts/config (default: arithmetic, the embedded task), or the path of a yaml file
#   --method NAME  rest_mcts (default), or rft: sample, keep the right solutions, fine-tune
#   --output DIR   default outputs/rest-mcts or outputs/rft, and -CONFIG for another configuration
#   --seed N       default 0
#   --dry-run      print the settings
#
# The embedded task runs on the CPU; it makes its own data and model.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

CONFIG=arithmetic METHOD=rest_mcts OUTPUT="" DRY_RUN=() SETTINGS=()
case "${1:-}" in -* | *=* | "") ;; *) CONFIG="$(from_caller "$1")"; shift ;; esac
while [ "$#" -gt 0 ]; do
    case "$1" in
        -h | --help) print_help; exit 0 ;;
        --dry-run) DRY_RUN=("$1"); shift ;;
        --method) need_value "$@"; one_of "$1" "$2" "rest_mcts rft" "rest_mcts or rft"; METHOD="$2"; shift 2 ;;
        --output) need_value "$@"; OUTPUT="$(absolute "${2%/}")"; shift 2 ;;
        --seed) need_value "$@"; SETTINGS+=("seed=$2"); shift 2 ;;
        -*) die "unknown option $1 (see --help)" 2 ;;
        *=*) SETTINGS+=("${1%%=*}=$(from_caller "${1#*=}")"); shift ;;
        *) die "$1 is neither an option nor a setting key=value (see --help)" 2 ;;
    esac
done
NAME="$(basename "$CONFIG" .yaml)"
SUFFIX="-$NAME"
[ "$NAME" != arithmetic ] || SUFFIX=""
OUTPUT="${OUTPUT:-$ROOT/outputs/${METHOD//_/-}$SUFFIX}"

[ "$NAME" != arithmetic ] || prefer_cpu "the embedded task is made for the CPU"
ensure_environment
if [ "$NAME" = arithmetic ] && [ "${#DRY_RUN[@]}" -eq 0 ]; then
    "$PY" -m examples.arithmetic.task --output data/arithmetic
    "$PY" -m examples.arithmetic.warm_start --data data/arithmetic --output models/arithmetic-warm
fi
exec "$PY" -m recipe.rest_mcts "$CONFIG" "method=$METHOD" "${SETTINGS[@]}" --output "$OUTPUT" "${DRY_RUN[@]}"
