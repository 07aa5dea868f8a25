#!/usr/bin/env bash
# The paper's run on NuminaMath: DeepSeek-R1-Distill-Qwen-1.5B on 4,000 random problems, n = 8, lr 1e-6, weight decay
# 0.01, batch 256, 16,384 tokens, alpha 2, kappa 0.06.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_train.sh"

NAME=numinamath-1.5b
MODEL=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
DATA_SET=numinamath
EVALUATION_SETS=(aime24 aime25 amc23 math500 minerva)
VALIDATION=aime24

# Tokens. The model thinks as long as DeepScaleR does and has the same context of 131,072, so the lengths are those of
# gcpo_deepscaler.sh, where they are worked out:
#   question 1,024 + fixed texts 57 + 9 x (1,024 + 16) = 10,441   the longest prompt with candidates
#   + 16,384 for the response that is scored behind it  = 26,825   -> a context of 27,648
# Collider draws and regenerated responses get 16,384 tokens too; gcpo/missing/draws_frac is the share that is lost.
# The paper gives no number of steps: 15 batches x 6 epochs are 90, as many as on AIME.
SETTINGS=(
    data.max_prompt_length=1024
    data.max_response_length=16384
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.max_model_len=27648
    gcpo.blocks.max_tokens=1024
    gcpo.collider.max_tokens=16384
    gcpo.regenerated.max_tokens=16384
    trainer.total_epochs=6
)

train "$@"
