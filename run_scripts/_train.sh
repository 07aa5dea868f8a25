# shellcheck shell=bash
# What the paper's training runs share; sourced by them. A run sets NAME, MODEL, DATA_SET, EVALUATION_SETS, VALIDATION
# (one of them, or nothing: what the data holds out) and SETTINGS, and calls `train "$@"`.

source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

train_help() {
    print_help
    cat << END

  bash run_scripts/$(basename "$0") [options] [verl and gcpo overrides, key=value ...]

  --model PATH_OR_HUB_ID   default $MODEL
  --data PATH_OR_HUB_ID    a parquet in verl's schema, or what \`python -m data_prep $DATA_SET\` reads (default: its
                           usual place on the hub; the evaluation sets are then prepared first, so that their questions
                           are left out: ${EVALUATION_SETS[*]})
  --val FILE               a parquet to validate on (default: ${VALIDATION:+$VALIDATION if it is prepared, else }what the data holds out)
  --gpus N                 per machine (default: all that nvidia-smi lists)
  --nodes N                machines of a running Ray cluster (default 1)
  --output DIR             default outputs/gcpo-$NAME
  --preset NAME            of GCPO: paper (default), balanced or light
  --method NAME            gcpo (default), gc2po, or grpo: the same run with the parts of GCPO off
  --dry-run                print the command and the resolved configuration; needs no GPU, model or data
  --resume-changed         go on from a checkpoint that was made with other settings

Run it again with the same arguments and it goes on from its checkpoint. Without a GPU it runs only with a local model
of at most 100 MB, with sizes to match.
END
}

# What all of the paper's runs have in common.
PAPER_SETTINGS=(
    data.train_batch_size=256
    actor_rollout_ref.actor.ppo_mini_batch_size=256
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.optim.weight_decay=0.01
    actor_rollout_ref.rollout.n=8
    gcpo.alpha=2.0
    gcpo.kappa=0.06
    trainer.save_freq=10
    trainer.test_freq=10
)
# Lengths and sizes for a model of a few million parameters on two cores: two steps.
CPU_SETTINGS=(
    device=cpu
    data.train_batch_size=4
    data.max_prompt_length=512
    data.max_response_length=64
    actor_rollout_ref.actor.ppo_mini_batch_size=4
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.max_model_len=null
    gcpo.blocks.max_tokens=64
    gcpo.collider.max_tokens=64
    gcpo.regenerated.max_tokens=64
    trainer.total_training_steps=2
    trainer.val_before_train=False
)

is_tiny_model() { # a local model folder whose files take at most 100 MB
    [ -f "$1/config.json" ] && [ "$(du -smL "$1" | cut -f1)" -le 100 ]
}

parse_arguments() {
    DATA=""
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
            -h | --help) train_help; exit 0 ;;
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
    case "$METHOD" in
        gcpo | gc2po | grpo) ;;
        *) die "--method is '$METHOD'; it must be gcpo, gc2po or grpo" 2 ;;
    esac
    case "$PRESET" in
        paper | balanced | light) ;;
        *) die "--preset is '$PRESET'; it must be paper, balanced or light" 2 ;;
    esac
    is_count "$NODES" || die "--nodes is '$NODES'; it must be a positive number" 2
    [ -z "$GPUS" ] || is_count "$GPUS" || die "--gpus is '$GPUS'; it must be a positive number" 2
    # What is named from where the caller stands must be found from the repository's root.
    MODEL="$(from_caller "$MODEL")"
    DATA="$(from_caller "$DATA")"
    VAL="$(from_caller "$VAL")"
    OUTPUT="${OUTPUT:-outputs/$METHOD-$NAME}"
    OUTPUT="$(absolute "${OUTPUT%/}")"
}

choose_device() { # sets ON_CPU where the run is one for the CPU
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
}

# Sets TRAIN and VAL, and prepares what is not prepared.
prepare_data() {
    local sets
    sets="$(absolute "${GCPO_DATA:-data}")"
    TRAIN="$OUTPUT/data/train.parquet"
    if [[ "$DATA" == *.parquet ]] && { [ -n "$DRY_RUN" ] || "$PY" -m data_prep --is-prepared "$DATA"; }; then
        TRAIN="$DATA"
    elif [ -z "$DRY_RUN" ]; then
        if [ -z "$DATA" ]; then
            local set
            for set in "${EVALUATION_SETS[@]}"; do
                [ -f "$sets/$set/test.parquet" ] || "$PY" -m data_prep "$set" --data "$sets"
            done
        fi
        "$PY" -m data_prep "$DATA_SET" ${DATA:+--source "$DATA"} --data "$sets" --output "$OUTPUT/data"
    fi
    if [ -z "$VAL" ]; then default_validation "$sets"; fi
    if [ -z "$VAL" ]; then
        say "nothing to validate on (--val FILE): the run reports its training reward alone"
        VAL="$TRAIN"
        SETTINGS+=(trainer.test_freq=-1 trainer.val_before_train=False)
    fi
}

default_validation() { # default_validation FOLDER_OF_THE_SETS; leaves VAL empty where there is nothing
    local candidates=()
    [ -z "$VALIDATION" ] || candidates+=("$1/$VALIDATION/test.parquet")
    [ "$TRAIN" = "$DATA" ] || candidates+=("$OUTPUT/data/test.parquet")
    for VAL in "${candidates[@]}"; do
        # Where a dry run would read the hub, the first one would be there by now.
        if [ -f "$VAL" ] || { [ -n "$DRY_RUN" ] && [ -z "$DATA" ]; }; then return; fi
    done
    VAL=""
}

train() {
    parse_arguments "$@"
    choose_device
    ensure_environment
    SETTINGS=("${PAPER_SETTINGS[@]}" "${SETTINGS[@]}")
    if [ -n "$ON_CPU" ]; then
        SETTINGS+=("${CPU_SETTINGS[@]}" "trainer.n_gpus_per_node=1")
    else
        SETTINGS+=("trainer.n_gpus_per_node=${GPUS:-$(count_gpus 8)}" "trainer.nnodes=$NODES")
    fi
    local config=()
    case "$METHOD" in
        gcpo) SETTINGS+=("gcpo.preset=$PRESET") ;;
        grpo) SETTINGS+=(gcpo.kappa=0 gcpo.weighting=off) ;;
        gc2po)
            config=(--config-name gc2po_trainer)
            SETTINGS+=(gcpo.kappa=0)
            ;;
    esac
    if [ "$NODES" -gt 1 ]; then
        # The other machines' processes don't inherit this one's environment.
        SETTINGS+=(
            +ray_kwargs.ray_init.address=auto
            "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH=$OUTPUT/metrics.jsonl"
        )
    fi
    prepare_data
    local command=(
        "$PY" -m recipe.gcpo.main_gcpo "${config[@]}"
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
        printf '%q ' "${command[@]}"
        printf '\n'
        say "# resolved configuration"
        PYTHONWARNINGS=ignore exec "${command[@]}" --cfg job --resolve
    fi
    "$PY" -m gcpo.tools.launch --output "$OUTPUT" "${LAUNCH[@]}" -- "${command[@]}"
    "$PY" -m gcpo.tools.report "$OUTPUT"
}
