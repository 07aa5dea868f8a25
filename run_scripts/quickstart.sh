#!/usr/bin/env bash
# Installs, makes the arithmetic questions and the warm-started model, trains it with GCPO, and shows accuracy on
# held-out questions before and after, the curves and the checkpoint. Run it again: what is done is not done again,
# and an interrupted run goes on from its checkpoint.
#
#   bash run_scripts/quickstart.sh [--method gcpo|gc2po|grpo] [--preset paper|balanced|light] [--seed N] [--steps N]
#                                  [--output DIR] [verl and gcpo overrides, key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

METHOD=gcpo
CONFIG=gcpo_quickstart
OUTPUT=""
SETTINGS=()
LAUNCH=()
OVERRIDES=()
while [ "$#" -gt 0 ]; do
    case "$1" in
        -h | --help) print_help; exit 0 ;;
        --method) need_value "$@"; METHOD="$2"; shift 2 ;;
        --preset) need_value "$@"; SETTINGS+=("gcpo.preset=$2"); shift 2 ;;
        --seed)
            need_value "$@"
            SETTINGS+=("gcpo.seed=$2" "data.seed=$2" "actor_rollout_ref.actor.data_loader_seed=$2")
            shift 2
            ;;
        --steps) need_value "$@"; SETTINGS+=("trainer.total_training_steps=$2"); shift 2 ;;
        --output) need_value "$@"; OUTPUT="$2"; shift 2 ;;
        --resume-changed) LAUNCH+=(--resume-changed); shift ;;
        -*) die "unknown option $1 (see --help)" 2 ;;
        *=*) OVERRIDES+=("$1"); shift ;;
        *) die "$1 is neither an option nor an override key=value (see --help)" 2 ;;
    esac
done
case "$METHOD" in
    gcpo) : "${OUTPUT:=outputs/quickstart}" ;;
    grpo)
        : "${OUTPUT:=outputs/quickstart-grpo}"
        SETTINGS+=(gcpo.kappa=0 gcpo.weighting=off)
        ;;
    gc2po)
        : "${OUTPUT:=outputs/quickstart-gc2po}"
        CONFIG=gc2po_quickstart
        ;;
    *) die "--method is '$METHOD'; it must be gcpo, gc2po or grpo" 2 ;;
esac
OUTPUT="${OUTPUT%/}"
ABSOLUTE="$(absolute "$OUTPUT")"

prefer_cpu "the embedded task is made for the CPU"
ensure_environment
[ "$GCPO_PROFILE" = cpu ] || SETTINGS+=(device=gpu)
"$PY" -m examples.arithmetic.task --output data/arithmetic
"$PY" -m examples.arithmetic.warm_start --data data/arithmetic --output models/arithmetic-warm

"$PY" -m gcpo.tools.launch --output "$OUTPUT" "${LAUNCH[@]}" -- \
    "$PY" -m recipe.gcpo.main_gcpo --config-name "$CONFIG" \
    "trainer.default_local_dir=$ABSOLUTE/checkpoints" \
    "trainer.rollout_data_dir=$ABSOLUTE/rollouts" \
    "hydra.run.dir=$ABSOLUTE/hydra" \
    "${SETTINGS[@]}" "${OVERRIDES[@]}"
"$PY" -m gcpo.tools.report "$OUTPUT"
