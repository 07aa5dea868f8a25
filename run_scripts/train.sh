#!/usr/bin/env bash
# Trains an experiment of gcpo/config/experiment: prepares its data, trains, and shows the curves, the accuracy before
# and after, and the checkpoint. Run it again with the same arguments and it goes on from its checkpoint.
#
#   bash run_scripts/train.sh EXPERIMENT [options] [verl and gcpo overrides, key=value ...]
#
# quickstart.sh, gcpo_*.sh, grpo_*.sh and gc2po_*.sh in run_scripts/ name the experiment and the method.
#
#   --method NAME            a method of gcpo/config/method (default gcpo); grpo is the run without the parts of GCPO
#   --preset NAME            of GCPO: paper, balanced or light (default: as the experiment says)
#   --model PATH_OR_HUB_ID   default: the model of the experiment
#   --data PATH_OR_HUB_ID    a parquet in verl's schema, or a source for `python -m data_prep` (default: the set's usual
#                            place on the hub, after the evaluation sets, whose questions are left out)
#   --val FILE               a parquet to validate on (default: the experiment's set, else what the data holds out)
#   --seed N                 of the data order and of every sampling request (default 0)
#   --steps N                training steps
#   --gpus N                 per machine (default: all that nvidia-smi lists)
#   --nodes N                machines of a running Ray cluster (default 1)
#   --output DIR             default outputs/METHOD-EXPERIMENT; outputs/quickstart[-METHOD] for the quick start
#   --dry-run                print the command and the resolved configuration; needs no GPU, model or data
#   --resume-changed         go on from a checkpoint that was made with other settings
#
# The embedded tasks (docs/tasks.md; arithmetic is that of the quick start) run on the CPU, and their data and models are
# made if they are absent. The other experiments run without a GPU only with a local model of at most 100 MB, for two
# short steps.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

setting() { sed -n "s/^ *$1: //p" "gcpo/config/experiment/$EXPERIMENT.yaml"; }

parse_arguments() {
    case "${1:-}" in -* | "") EXPERIMENT="" ;; *) EXPERIMENT="$1"; shift ;; esac
    METHOD=gcpo DATA="" MODEL="" VAL="" GPUS="" NODES=1 OUTPUT="" DRY_RUN="" LAUNCH=() SETTINGS=() OVERRIDES=()
    while [ "$#" -gt 0 ]; do
        case "$1" in
            -h | --help) print_help; exit 0 ;;
            --dry-run) DRY_RUN=1; shift; continue ;;
            --resume-changed) LAUNCH=("$1"); shift; continue ;;
            --method | --preset | --model | --data | --val | --seed | --steps | --gpus | --nodes | --output) need_value "$@" ;;
            -*) die "unknown option $1 (see --help)" 2 ;;
            *=*) OVERRIDES+=("$1"); shift; continue ;;
            *) die "$1 is neither an option nor an override key=value (see --help)" 2 ;;
        esac
        case "$1" in
            --method) METHOD="$2" ;;
            --preset) one_of "$1" "$2" "paper balanced light" "paper, balanced or light"; SETTINGS+=("gcpo.preset=$2") ;;
            --model) MODEL="$(from_caller "$2")" ;;
            --data) DATA="$(from_caller "$2")" ;;
            --val) VAL="$(from_caller "$2")" ;;
            --seed) SETTINGS+=("gcpo.seed=$2" "data.seed=$2" "actor_rollout_ref.actor.data_loader_seed=$2") ;;
            --steps) is_count "$@"; SETTINGS+=("trainer.total_training_steps=$2") ;;
            --gpus) is_count "$@"; GPUS="$2" ;;
            --nodes) is_count "$@"; NODES="$2" ;;
            --output) OUTPUT="$(absolute "${2%/}")" ;;
        esac
        shift 2
    done
    [ -f "gcpo/config/method/$METHOD.yaml" ] || die "--method is '$METHOD'; it must be one of $(options method)" 2
    [ -f "gcpo/config/experiment/$EXPERIMENT.yaml" ] ||
        die "which experiment? '$EXPERIMENT' is none of $(options experiment)" 2
}

options() { (cd "gcpo/config/$1" && echo *.yaml | sed 's/\.yaml//g'); } # options GROUP

# An experiment that names the model which examples.tasks makes under its own name.
is_task() { [ "$(setting path)" = "models/$EXPERIMENT-warm" ]; }

# Sets PLACES (files and folders of the run) for an embedded task, whose data and model are made here.
prepare_task() {
    CONFIG=gcpo_quickstart
    PLACES=(${MODEL:+"actor_rollout_ref.model.path=$MODEL"} ${DATA:+"data.train_files=$DATA"} ${VAL:+"data.val_files=$VAL"})
    prefer_cpu "the embedded tasks are made for the CPU"
    ensure_environment
    [ "$GCPO_PROFILE" = cpu ] || SETTINGS=(device=gpu "${SETTINGS[@]}")
    SETTINGS=("experiment=$EXPERIMENT" "${SETTINGS[@]}")
    [ -z "$DRY_RUN" ] || return 0
    hold_output
    "$PY" -m examples.tasks "$EXPERIMENT"
}

is_tiny_model() { # a local model folder whose files take at most 100 MB
    [ -f "$1/config.json" ] && [ "$(du -smL "$1" | cut -f1)" -le 100 ]
}

prepare_experiment() {
    local device=()
    MODEL="${MODEL:-$(setting path)}"
    CONFIG=gcpo_trainer
    if has_gpu; then
        device=("trainer.n_gpus_per_node=${GPUS:-$(count_gpus)}" "trainer.nnodes=$NODES")
    elif is_tiny_model "$MODEL"; then
        say "no NVIDIA GPU here: two steps on the CPU, since $MODEL is small"
        device=(size=tiny device=cpu)
    elif [ -n "$DRY_RUN" ]; then
        say "no NVIDIA GPU here: the dry run needs none"
        device=("trainer.n_gpus_per_node=${GPUS:-8}" "trainer.nnodes=$NODES")
    else
        die "no NVIDIA GPU here, and $MODEL needs one; try --dry-run, or --model with a local model of at most 100 MB"
    fi
    ensure_environment
    if [ "$NODES" -gt 1 ]; then
        # The processes on other machines do not inherit this environment.
        device+=(
            ++ray_kwargs.ray_init.address=auto
            "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH=$OUTPUT/metrics.jsonl"
        )
    fi
    SETTINGS=("experiment=$EXPERIMENT" "${device[@]}" "${SETTINGS[@]}")
    [ -n "$DRY_RUN" ] || hold_output
    prepare_data
    PLACES=("data.train_files=$TRAIN" "data.val_files=$VAL" "actor_rollout_ref.model.path=$MODEL")
}

# Sets TRAIN and VAL, and prepares the sets that are missing.
prepare_data() {
    local sets set
    sets="$(absolute "${GCPO_DATA:-data}")"
    TRAIN="$OUTPUT/data/train.parquet"
    if [[ "$DATA" == *.parquet ]] && { [ -n "$DRY_RUN" ] || "$PY" -m data_prep --is-prepared "$DATA"; }; then
        TRAIN="$DATA"
    elif [ -z "$DRY_RUN" ]; then
        for set in $([ -n "$DATA" ] || setting evaluation_sets); do
            [ -f "$sets/$set/test.parquet" ] || "$PY" -m data_prep "$set" --data "$sets"
        done
        "$PY" -m data_prep "$(setting data_set)" ${DATA:+--source "$DATA"} --data "$sets" --output "$OUTPUT/data"
    fi
    [ -n "$VAL" ] || default_validation "$sets"
    if [ -z "$VAL" ]; then
        say "nothing to validate on (--val FILE): the run reports only its training reward"
        VAL="$TRAIN"
        SETTINGS+=(trainer.test_freq=-1 trainer.val_before_train=False)
    fi
}

default_validation() { # default_validation FOLDER_OF_THE_SETS; leaves VAL empty if there is nothing
    local candidates=() set
    for set in $(setting validation); do candidates+=("$1/$set/test.parquet"); done
    [ "$TRAIN" = "$DATA" ] || candidates+=("$OUTPUT/data/test.parquet")
    for VAL in "${candidates[@]}"; do
        # A dry run without --data assumes that the first one has been prepared.
        if [ -f "$VAL" ] || { [ -n "$DRY_RUN" ] && [ -z "$DATA" ]; }; then return; fi
    done
    VAL=""
}

# Two starts at once: the second one must not prepare data under the first one. The launcher inherits the lock.
hold_output() {
    mkdir -p "$OUTPUT" || die "can't make $OUTPUT"
    command -v flock >/dev/null 2>&1 || return 0
    exec 8> "$OUTPUT/.start.lock" || die "can't write into $OUTPUT"
    flock --nonblock 8 || die "a run is going on in $OUTPUT; wait for it or give another --output" 2
}

parse_arguments "$@"
NAME="$METHOD-${EXPERIMENT//_/-}"
if [ "$EXPERIMENT" = arithmetic ]; then
    NAME="quickstart-$METHOD"
    NAME="${NAME%-gcpo}"
fi
OUTPUT="${OUTPUT:-$(absolute "outputs/$NAME")}"
if is_task; then prepare_task; else prepare_experiment; fi
COMMAND=(
    "$PY" -m recipe.gcpo.main_gcpo --config-name "$CONFIG" "method=$METHOD" "${PLACES[@]}"
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
# One process that replaces this one: a signal to the script reaches the launcher, which ends the run in order.
exec "$PY" -m gcpo.tools.launch --report --output "$OUTPUT" "${LAUNCH[@]}" -- "${COMMAND[@]}"
