#!/usr/bin/env bash
# The paper's third model: DeepSeek-R1-Distill-Qwen-7B, on the same 4,000 problems of NuminaMath (the paper doesn't say
# on what), n = 8, lr 1e-6, weight decay 0.01, batch 256, 16,384 tokens, alpha 2, kappa 0.06.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_train.sh"

NAME=numinamath-7b
MODEL=deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
DATA_SET=numinamath
EVALUATION_SETS=(aime24 aime25 amc23 math500 minerva)
VALIDATION=aime24

# Tokens: as in gcpo_numinamath_1.5b.sh; this model has the same context of 131,072.
#   question 1,024 + fixed texts 57 + 9 x (1,024 + 16) = 10,441   the longest prompt with candidates
#   + 16,384 for the response that is scored behind it  = 26,825   -> a context of 27,648
# Collider draws and regenerated responses get 16,384 tokens too; gcpo/missing/draws_frac is the share that is lost.
# A response keeps 56 KiB of keys and values a token in vLLM, 1.5 GB at the longest; spread over two GPUs the weights
# (15 GB) leave room for twice as many at a time.
SETTINGS=(
    data.max_prompt_length=1024
    data.max_response_length=16384
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768
    actor_rollout_ref.rollout.tensor_model_parallel_size=2
    actor_rollout_ref.rollout.max_model_len=27648
    gcpo.blocks.max_tokens=1024
    gcpo.collider.max_tokens=16384
    gcpo.regenerated.max_tokens=16384
    trainer.total_epochs=6
)

train "$@"
