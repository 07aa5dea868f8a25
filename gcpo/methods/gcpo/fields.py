"""The batch fields of GCPO. n responses in a group, D = L + L' collider draws for each, M generations over each."""

from __future__ import annotations

from functools import partial

import torch

from gcpo.methods.fields import Field

_sample = partial(Field, writer="sample")
_score = partial(Field, writer="score", readers="credit")

CONTEXTS = _sample(
    "gcpo_contexts",
    torch.int64,
    "[sum of context_lengths]",
    readers="score, update",
    meaning="Prompts x_{i,l}, one after another: first over the L shared draws, then over the L' leave-one-out draws.",
)
CONTEXT_LENGTHS = _sample(
    "gcpo_context_lengths",
    torch.int64,
    "[D]",
    readers="score, credit, update",
    meaning="Tokens of every context; 0 where its draw is not valid.",
)
OUTPUTS = _sample(
    "gcpo_outputs",
    torch.int64,
    "[sum of output_lengths]",
    readers="score",
    meaning="Generations O_{i,l,m} over the contexts, one after another.",
)
OUTPUT_LENGTHS = _sample(
    "gcpo_output_lengths",
    torch.int64,
    "[D * M]",
    readers="score, credit",
    meaning="Tokens of every generation; 0 where it is not valid.",
)
KL_WEIGHT = _sample(
    "gcpo_kl_weight",
    torch.float32,
    "[1]",
    readers="score, credit, update",
    meaning="Weight of the response's kappa term; 0: it has none.",
)
GROUP = _sample(
    "gcpo_group",
    None,
    "dict",
    readers="credit",
    meaning="In the first row of a group: its counts, the token counts of its prompts, and why draws are missing.",
)
DUMP_TOKENS = _sample(
    "gcpo_dump_tokens", torch.int32, "[tokens]", readers="report", meaning="Token ids of the draws that are dumped."
)
DUMP_DRAWS = _sample(
    "gcpo_dump_draws",
    torch.int32,
    "[5 * draws]",
    readers="report",
    meaning="Kind, outcome, tokens, left-out response (-1: none) and blocks of the prompt of every draw.",
)
DUMP_PROMPTS = _sample(
    "gcpo_dump_prompts",
    torch.int32,
    "[blocks]",
    readers="report",
    meaning="The blocks of the prompts in order: k for response k, -1 - j for the draw j of the group.",
)
DUMP_REWARDS = _sample(
    "gcpo_dump_rewards", torch.float32, "[draws]", readers="report", meaning="Their rewards; NaN: not graded."
)
Z = _score("gcpo_z", torch.float32, "[d]", meaning="The hidden state z_i of the response.")
Z_REGENERATED = _score(
    "gcpo_z_regenerated",
    torch.float32,
    "[D * M * d]",
    meaning="The states Z_{i,l,m}; zeros where there is no generation.",
)
LOG_P = _score(
    "gcpo_log_p",
    torch.float32,
    "[D * T]",
    meaning="log pi_old(y_t | x_{i,l}, y_<t); zeros where there is no context or no kappa term.",
)
SCORED_TOKENS = _score(
    "gcpo_scored_tokens",
    torch.float32,
    "[4]",
    meaning="An equal part of the rank's tokens through the model, and the row's own without sharing, by kind.",
)
LOG_REF = Field(
    "gcpo_log_ref",
    torch.float32,
    "[T]",
    writer="credit",
    readers="update",
    meaning="log pi'_ref of every token (Eq. 13).",
)
KL_MASK = Field(
    "gcpo_kl_mask",
    torch.int64,
    "[T]",
    writer="credit",
    readers="update, report",
    meaning="1 for the tokens with a kappa term.",
)
LOG_RHO = Field(
    "gcpo_log_rho",
    torch.float32,
    "[T]",
    writer="credit",
    readers="report",
    meaning="log pi'_ref - log pi_old(y_t | x_{i,0}, y_<t), only if rollouts are dumped.",
)
DUMP = (DUMP_TOKENS, DUMP_DRAWS, DUMP_REWARDS, DUMP_PROMPTS)
ALL = (
    CONTEXTS,
    CONTEXT_LENGTHS,
    OUTPUTS,
    OUTPUT_LENGTHS,
    KL_WEIGHT,
    GROUP,
    *DUMP,
    Z,
    Z_REGENERATED,
    LOG_P,
    SCORED_TOKENS,
    LOG_REF,
    KL_MASK,
    LOG_RHO,
)
