#!/usr/bin/env bash
# Trains with GCPO. run_grpo.sh, the baseline, and run_gc2po.sh are the same command with another method.
#
#   TRAIN_FILE=train.parquet TEST_FILE=test.parquet bash recipe/gcpo/run_gcpo.sh [key=value ...]
#
# Start it in the folder that holds `recipe`, the checkout of verl. TRAIN_FILE and TEST_FILE are in verl's schema. Other
# variables, all optional:
#   EXPERIMENT=NAME     settings in src/gcpo/config/experiment (default deepscaler)
#   MODEL_PATH=PATH     a folder or a hub id (default: the model of the experiment)
set -euo pipefail

: "${TRAIN_FILE:?give a parquet file in the schema of verl}" "${TEST_FILE:?give a parquet file in the schema of verl}"

exec python3 -m recipe.gcpo.main_gcpo "method=${METHOD:-gcpo}" "experiment=${EXPERIMENT:-deepscaler}" \
    "data.train_files=$TRAIN_FILE" "data.val_files=$TEST_FILE" \
    ${MODEL_PATH:+"actor_rollout_ref.model.path=$MODEL_PATH"} "$@"
