#!/usr/bin/env bash
# The paper's run on code: Qwen2-7B-Instruct, on MBPP's 374 problems (the paper doesn't say on what), n = 8, lr 1e-6,
# weight decay 0.01, batch 256, alpha 2, kappa 0.06. Responses have 2,048 tokens: 16,384 don't fit into 32,768 with the
# others' in the prompt.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_train.sh"

NAME=code-qwen2-7b
MODEL=Qwen/Qwen2-7B-Instruct
DATA_SET=mbpp
EVALUATION_SETS=(humaneval)
VALIDATION="" # what MBPP itself holds out

# Tokens. The model doesn't think aloud, and a solution with a few words around it takes some hundred tokens; with 2,048
# a candidate block holds every response whole. A label counts 16 tokens; a ninth block is the collider draw where it is
# appended (gcpo.reference.collider_context=append):
#   question 1,024 + fixed texts 57 + 9 x (2,048 + 16) = 19,657   the longest prompt with candidates
#   + 2,048 for the response that is scored behind it   = 21,705   -> a context of 22,528
# Collider draws and regenerated responses are programs too and get as many tokens as a response, 2,048; the share
# that is cut and left out is in gcpo/missing/draws_frac. They are not run for the metrics, since that time would come on
# top of every step (gcpo.metrics.graded_fraction).
# The paper gives no number of steps: one batch of MBPP's 374 problems x 90 epochs are 90, as many as on AIME.
SETTINGS=(
    data.max_prompt_length=1024
    data.max_response_length=2048
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24576
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.max_model_len=22528
    gcpo.blocks.max_tokens=2048
    gcpo.collider.max_tokens=2048
    gcpo.regenerated.max_tokens=2048
    gcpo.metrics.graded_fraction=0
    trainer.total_epochs=90
)

train "$@"
