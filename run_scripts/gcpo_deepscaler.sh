#!/usr/bin/env bash
# The paper's run: DeepScaleR-1.5B-Preview on AIME problems up to 2023, n = 8, lr 1e-6, weight decay 0.01, batch 256,
# 16,384 tokens, alpha 2, kappa 0.06. Run it again with the same arguments and it goes on from its checkpoint.
#
#   bash run_scripts/gcpo_deepscaler.sh [options] [verl and gcpo overrides, key=value ...]
#
#   --model PATH_OR_HUB_ID   default agentica-org/DeepScaleR-1.5B-Preview
#   --data PATH_OR_HUB_ID    a parquet in verl's schema, or AIME as json, jsonl, parquet or from the hub
#                            (default di-zhang-fdu/AIME_1983_2024)
#   --val FILE               a parquet to validate on (default: the data's problems after 2023, if it has any)
#   --gpus N                 per machine (default: all that nvidia-smi lists)
#   --nodes N                machines of a running Ray cluster (default 1)
#   --output DIR             default outputs/gcpo-deepscaler
#   --preset NAME            paper (default), balanced or light
#   --method gcpo|grpo       grpo: the same run with the parts of GCPO off
#   --dry-run                print the command and the resolved configuration; needs no GPU, model or data
#   --resume-changed         go on from a checkpoint that was made with other settings
#
# Without a GPU it runs only with a local model of at most 100 MB, with sizes to match.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

MODEL=agentica-org/DeepScaleR-1.5B-Preview
DATA=di-zhang-fdu/AIME_1983_2024
VAL=""
GPUS=""
NODES=1
OUTPUT=""
PRESET=paper
METHOD=gcpo
DRY_RUN=""
LAUNCH=()
OVERRIDES=()
while [ "$#" -gt 0 ]; do
    case "$1" in
        -h | --help) print_help; exit 0 ;;
        --model) need_value "$@"; MODEL="$2"; shift 2 ;;
        --data) need_value "$@"; DATA="$2"; shift 2 ;;
        --val) need_value "$@"; VAL="$2"; shift 2 ;;
        --gpus) need_value "$@"; GPUS="$2"; shift 2 ;;
        --nodes) need_value "$@"; NODES="$2"; shift 2 ;;
        --output) need_value "$@"; OUTPUT="$2"; shift 2 ;;
        --preset) need_value "$@"; PRESET="$2"; shift 2 ;;
        --method) need_value "$@"; METHOD="$2"; shift 2 ;;
        --dry-run) DRY_RUN=1; shift ;;
        --resume-changed) LAUNCH+=(--resume-changed); shift ;;
        -*) die "unknown option $1 (see --help)" 2 ;;
        *=*) OVERRIDES+=("$1"); shift ;;
        *) die "$1 is neither an option nor an override key=value (see --help)" 2 ;;
    esac
done
case "$METHOD" in gcpo | grpo) ;; *) die "--method is '$METHOD'; it must be gcpo or grpo" 2 ;; esac
case "$PRESET" in paper | balanced | light) ;; *) die "--preset is '$PRESET'; it must be paper, balanced or light" 2 ;; esac
is_count "$NODES" || die "--nodes is '$NODES'; it must be a positive number" 2
[ -z "$GPUS" ] || is_count "$GPUS" || die "--gpus is '$GPUS'; it must be a positive number" 2
# What is named from where the caller stands must be found from the repository's root.
MODEL="$(from_caller "$MODEL")"
DATA="$(from_caller "$DATA")"
VAL="$(from_caller "$VAL")"
OUTPUT="${OUTPUT:-outputs/$METHOD-deepscaler}"
OUTPUT="$(absolute "${OUTPUT%/}")"

# Tokens. Eight whole responses of 16,384 are 131,072, which is the model's whole context before the question stands in
# it, so a candidate block holds the last 1,024 tokens of a response, after its <think> part is left out: the answer and
# the words before it. Blocks and labels (a label counts one token a character, 16 at most), with a ninth block where the
# collider draw is appended (gcpo.reference.collider_context=append):
#   question 1,024 + fixed texts 57 + 9 x (1,024 + 16) = 10,441   the longest prompt with candidates
#   + 16,384 for the response that is scored behind it  = 26,825   -> a context of 27,648
# Collider draws and conditioned generations see the others' answers and are given 4,096 tokens; 10,441 + 4,096 fits.
SETTINGS=(
    data.train_batch_size=256
    data.max_prompt_length=1024
    data.max_response_length=16384
    actor_rollout_ref.actor.ppo_mini_batch_size=256
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.optim.weight_decay=0.01
    actor_rollout_ref.rollout.n=8
    actor_rollout_ref.rollout.max_model_len=27648
    gcpo.alpha=2.0
    gcpo.kappa=0.06
    gcpo.blocks.max_tokens=1024
    gcpo.collider.max_tokens=4096
    gcpo.conditioned.max_tokens=4096
    trainer.total_epochs=30
    trainer.save_freq=10
    trainer.test_freq=10
)
# The same with lengths and sizes for a model of a few million parameters on two cores: two steps.
CPU_SETTINGS=(
    device=cpu
    data.train_batch_size=4
    data.max_prompt_length=512
    data.max_response_length=64
    actor_rollout_ref.actor.ppo_mini_batch_size=4
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192
    actor_rollout_ref.rollout.max_model_len=null
    gcpo.blocks.max_tokens=64
    gcpo.collider.max_tokens=64
    gcpo.conditioned.max_tokens=64
    trainer.total_training_steps=2
    trainer.val_before_train=False
)

is_tiny_model() { # a local model folder whose files take at most 100 MB
    [ -f "$1/config.json" ] && [ "$(du -smL "$1" | cut -f1)" -le 100 ]
}

ON_CPU=""
if ! has_gpu; then
    if [ -n "$DRY_RUN" ]; then
        say "no NVIDIA GPU here: the dry run needs none"
    elif is_tiny_model "$MODEL"; then
        say "no NVIDIA GPU here: two steps on the CPU, since $MODEL is small"
    else
        die "no NVIDIA GPU here, and $MODEL needs one; try --dry-run, or --model with a local model of at most 100 MB"
    fi
    if is_tiny_model "$MODEL"; then ON_CPU=1; fi
    prefer_cpu "no NVIDIA GPU answers"
fi
ensure_environment

if [ -n "$ON_CPU" ]; then
    SETTINGS+=("${CPU_SETTINGS[@]}" "trainer.n_gpus_per_node=1")
else
    SETTINGS+=("trainer.n_gpus_per_node=${GPUS:-$(count_gpus 8)}" "trainer.nnodes=$NODES")
fi
if [ "$METHOD" = grpo ]; then SETTINGS+=(gcpo.kappa=0 gcpo.weighting=off); else SETTINGS+=("gcpo.preset=$PRESET"); fi
if [ "$NODES" -gt 1 ]; then
    # The other machines' processes don't inherit this one's environment.
    SETTINGS+=(
        +ray_kwargs.ray_init.address=auto
        "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH=$OUTPUT/metrics.jsonl"
    )
fi

TRAIN="$OUTPUT/data/train.parquet"
if [[ "$DATA" == *.parquet ]] && { [ -n "$DRY_RUN" ] || "$PY" -m data_prep.deepscaler --is-prepared "$DATA"; }; then
    TRAIN="$DATA"
elif [ -z "$DRY_RUN" ]; then
    "$PY" -m data_prep.deepscaler --source "$DATA" --output "$OUTPUT/data"
    if [ -z "$VAL" ] && [ -f "$OUTPUT/data/test.parquet" ]; then VAL="$OUTPUT/data/test.parquet"; fi
elif [ -z "$VAL" ] && [ ! -e "$DATA" ]; then
    VAL="$OUTPUT/data/test.parquet" # the hub's set has a year after 2023
fi
if [ -z "$VAL" ]; then
    say "nothing to validate on (--val FILE): the run reports its training reward alone"
    VAL="$TRAIN"
    SETTINGS+=(trainer.test_freq=-1 trainer.val_before_train=False)
fi

COMMAND=(
    "$PY" -m recipe.gcpo.main_gcpo
    "data.train_files=$TRAIN"
    "data.val_files=$VAL"
    "actor_rollout_ref.model.path=$MODEL"
    "trainer.experiment_name=$(basename "$OUTPUT")"
    "trainer.default_local_dir=$OUTPUT/checkpoints"
    "trainer.rollout_data_dir=$OUTPUT/rollouts"
    "hydra.run.dir=$OUTPUT/hydra"
    "${SETTINGS[@]}" "${OVERRIDES[@]}"
)
if [ -n "$DRY_RUN" ]; then
    say "# command"
    printf '%q ' "${COMMAND[@]}"
    printf '\n'
    say "# resolved configuration"
    PYTHONWARNINGS=ignore exec "${COMMAND[@]}" --cfg job --resolve
fi
"$PY" -m gcpo.launch --output "$OUTPUT" "${LAUNCH[@]}" -- "${COMMAND[@]}"
"$PY" -m gcpo.report "$OUTPUT"
