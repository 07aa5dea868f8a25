"""The counters of a step, made as a run makes them, against ``gcpo.tools.cost`` with the mean lengths of that step."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from examples.arithmetic.warm_start import Recipe, make_tokenizer
from gcpo.adapters.term import term_batch
from gcpo.collider.prompts import BlockBudget, CandidatePrompts, PromptTemplate
from gcpo.methods.base import Run
from gcpo.methods.fields import flat
from gcpo.methods.fields import lengths as lengths_of
from gcpo.methods.gcpo.draws import ColliderSampler
from gcpo.methods.gcpo.method import GCPO
from gcpo.methods.gcpo.rollout_metrics import rollout_metrics
from gcpo.methods.gcpo.scoring import score_rows
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.methods.gcpo.term import KappaTerm
from gcpo.scoring.requests import Score, ScoreRequest
from gcpo.scoring.rows import pack_rows
from gcpo.tools.cost.command import compare
from gcpo.tools.cost.inputs import of_log
from gcpo.tools.cost.step import Simulation, Step, draw_limits
from gcpo.tools.cost.texts import Tokenizer
from tests.adapters.ranks import pack

GROUPS, LIMIT, END = 192, 64, 2
GENERATED = {"preset": "balanced", "collider": {"num_draws": 2}, "features": {"source": "response"}}
"""L = 2, L' = 1, M = 1."""


class Server:
    """Ragged answers, some of them cut, and a prefix cache of vLLM's rules."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.seen: set[tuple[int, ...]] = set()

    def prefill(self, prompt: list[int]) -> int:
        """Tokens that are cached: whole blocks, never the last token."""
        blocks = [tuple(prompt[: k * self.block]) for k in range(1, len(prompt) // self.block + 1)]
        cached = 0
        for known in blocks:
            if known not in self.seen or len(known) >= len(prompt):
                break
            cached = len(known)
        self.seen.update(blocks)
        return cached

    async def __call__(self, prompt: list[int], params: dict[str, Any]) -> Any:
        rng = np.random.default_rng(params["seed"])
        length = int(rng.choice([rng.integers(4, 20), rng.integers(30, 50)]))
        ids = [*rng.integers(10, 300, length).tolist(), END]
        if rng.random() < 0.05:
            ids = rng.integers(10, 300, params["max_tokens"]).tolist()
        return SimpleNamespace(
            token_ids=ids, stop_reason="completed", extra_fields={"num_cached_tokens": self.prefill(prompt)}
        )


class CountingScorer:
    """Packs what it is asked, and scores nothing."""

    def __init__(self, budget: int, min_shared: int) -> None:
        self.options = {"budget": budget, "min_shared": min_shared}
        self.tokens = 0

    def __call__(self, requests: list[ScoreRequest]) -> list[Score]:
        sequences = [torch.cat([request.context, request.target]) for request in requests]
        nothing = [None] * len(requests)
        self.tokens += sum(len(row.pack) for row in pack_rows(sequences, [1] * len(requests), nothing, **self.options))
        states = [None if r.state_at is None else torch.zeros(1) for r in requests]
        return [Score(torch.zeros(len(r.target)), state) for r, state in zip(requests, states, strict=True)]


def simulate(config: GCPOConfig, n: int, budget: int, block: int) -> tuple[dict[str, float], Any]:
    """What a step logs: means over its responses, and its counters."""
    tokenizer = make_tokenizer(Recipe())
    blocks = config.blocks
    prompts = CandidatePrompts(
        tokenizer,
        BlockBudget(blocks.max_tokens, blocks.truncation, blocks.drop_think),
        PromptTemplate(blocks.intro, blocks.candidate, blocks.collider, blocks.outro),
    )
    rng = np.random.default_rng(5)
    rows, stats, questions, lengths = [], [], [], []
    for group in range(GROUPS):
        messages = [{"role": "user", "content": f"What is {rng.integers(10, 99999)} + {rng.integers(10, 99999)}?"}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        question = tokenizer.encode(text, add_special_tokens=False)
        # Groups differ in length, and so do the responses of a group.
        responses = [[*rng.integers(10, 300, rng.integers(5, 25 + group % 96 // 2)).tolist(), END] for _ in range(n)]
        server = Server(block)
        for _ in range(n):
            server.prefill(question)
        stage = ColliderSampler(config, prompts, server, {"temperature": 1.0}, 4096, frozenset({END}))
        result = asyncio.run(stage.run(messages, responses, seed_parts=(1, str(group)), equal_rewards=group % 3 == 0))
        stats.append(result.stats)
        questions.append(len(question))
        lengths += map(len, responses)
        for i, response in enumerate(responses):
            valid = any(result.contexts[i][: config.collider.num_draws]) and result.kl_weight[i] > 0
            rows.append(
                {
                    "prompts": torch.tensor(question),
                    "responses": torch.tensor(response),
                    "response_mask": torch.ones(len(response), dtype=torch.long),
                    "gcpo_kl_weight": torch.tensor([result.kl_weight[i]]),
                    "gcpo_kl_mask": torch.full((len(response),), int(valid)),
                    "gcpo_log_ref": torch.zeros(len(response)),
                    "gcpo_contexts": flat(result.contexts[i]),
                    "gcpo_context_lengths": lengths_of(result.contexts[i]),
                    "gcpo_outputs": flat(result.outputs[i]),
                    "gcpo_output_lengths": lengths_of(result.outputs[i]),
                }
            )
    scorer = CountingScorer(budget, config.scoring.min_shared_tokens)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    scored = torch.stack(score_rows(columns, config, scorer, {END})["gcpo_scored_tokens"]).sum(0).tolist()
    engine = SimpleNamespace(tree_problem=None, max_over_ranks=lambda count: count)
    batch, _ = term_batch(engine, pack(rows), KappaTerm(config, budget))
    trained = batch["input_ids"].values().numel()
    tokens = sum(lengths)
    log = rollout_metrics(stats, tokens)
    log |= {"prompt_length/mean": float(np.mean(questions)), "response_length/mean": tokens / len(lengths)}
    log |= {"gcpo/tokens/scored": scored[0], "gcpo/tokens/trained/kappa_rows": float(trained)}
    log |= {"gcpo/tokens/scored_unshared": sum(scored[1:]), "gcpo/tokens/trained/plain": tokens + n * sum(questions)}
    return log, tokenizer


@pytest.mark.parametrize(
    ("n", "budget", "block", "config"),
    [
        (8, 8192, 16, GENERATED),
        (8, 8192, 32, {"preset": "balanced"}),
        (8, 8192, 32, {"preset": "light"}),
        (8, 600, 16, {**GENERATED, "reference": {"subsample": 1.0}}),
        (5, 8192, 16, {"preset": "paper", "collider": {"num_draws": 3, "num_generations": 2}}),
        (8, 700, 16, {"preset": "balanced", "blocks": {"max_tokens": 12}, "features": {"input": "prompt_response"}}),
        (8, 8192, 16, {**GENERATED, "weighting": "off", "reference": {"subsample": 0.5}}),
    ],
    ids=["generated", "balanced", "light", "tight budget", "paper", "short blocks", "kappa alone"],
)
def test_the_model_agrees_with_the_counters(n: int, budget: int, block: int, config: dict[str, Any]) -> None:
    """Every counter, within 5 %."""
    gcpo = GCPOConfig.from_config({**config, "metrics": {"grad_norm_every": 0}}, n=n, response_length=LIMIT)
    log, tokenizer = simulate(gcpo, n, budget, block)
    run = Run(n=n, response_length=LIMIT, max_tokens=budget)
    step = Step(run, questions=GROUPS, cache_block=block)
    lengths = of_log(log, draw_limits(gcpo))
    expected = Simulation(GCPO(gcpo, run), step, lengths, Tokenizer(tokenizer), groups=96).run()
    compared = compare(expected, log)
    print({name: f"{b / a - 1:+.1%}" for name, (a, b) in compared.items()})
    assert {"scored", "scored_unshared", "trained/kappa_rows", "generated/collider", "cached"} <= set(compared)
    assert ("generated/regenerated" in compared) == gcpo.needs_generations
    for name, (logged, model) in compared.items():
        assert model == pytest.approx(logged, rel=0.05), name
