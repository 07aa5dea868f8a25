#!/usr/bin/env bash
# The paper's run on AIME: DeepScaleR-1.5B-Preview on the 919 problems up to 2023, n = 8, lr 1e-6, weight decay 0.01,
# batch 256, 16,384 tokens, alpha 2, kappa 0.06.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_train.sh"

NAME=deepscaler
MODEL=agentica-org/DeepScaleR-1.5B-Preview
DATA_SET=aime
EVALUATION_SETS=(aime24 aime25 amc23 math500 minerva)
VALIDATION=aime24

# Tokens. Eight whole responses of 16,384 are 131,072, which is the model's whole context before the question stands in
# it, so a candidate block holds the last 1,024 tokens of a response, after its <think> part is left out: the answer and
# the words before it. Blocks and labels (a label counts one token a character, 16 at most), with a ninth block where the
# collider draw is appended (gcpo.reference.collider_context=append):
#   question 1,024 + fixed texts 57 + 9 x (1,024 + 16) = 10,441   the longest prompt with candidates
#   + 16,384 for the response that is scored behind it  = 26,825   -> a context of 27,648
# A collider draw or regenerated response that is cut is left out, and long answers are cut first, so both get as many
# tokens as a response: 10,441 + 16,384 fits the same context. The run counts those that are lost all the same:
# gcpo/rollout/*/cut, and their share in gcpo/missing/draws_frac.
# The paper gives no number of steps: 3 batches x 30 epochs are 90.
SETTINGS=(
    data.max_prompt_length=1024
    data.max_response_length=16384
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.max_model_len=27648
    gcpo.blocks.max_tokens=1024
    gcpo.collider.max_tokens=16384
    gcpo.regenerated.max_tokens=16384
    trainer.total_epochs=30
)

train "$@"
