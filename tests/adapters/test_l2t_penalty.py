"""The penalties of L2T on the real engine, against autograd through transformers' model in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gcpo.adapters.worker import METHOD_CALL
from gcpo.episodes import split_response
from gcpo.methods.base import Run
from gcpo.tokens import TokenReader
from tests.adapters.ranks import pack, run_on_ranks, weights
from tests.adapters.test_l2t import OVERRIDES, N, make_rows

TEMPERATURE, STEP_SIZE = 0.7, 0.1
RUNS = {
    "one_step": {"penalty": "one_step"},
    "one_step, dense": {"penalty": "one_step"},
    "released": {"penalty": "released"},
    "released, dense": {"penalty": "released"},
    "released, unchanged": {"penalty": "released"},
}


def change_of(name: str, shape: torch.Size) -> torch.Tensor:
    """D of a weight."""
    generator = torch.Generator().manual_seed(len(name))
    return 0.01 * torch.randn(shape, generator=generator)


def score_on_ranks(rank: int, world: int, config: Any, rows: list[dict[str, torch.Tensor]]) -> Any:
    """``l2t_penalty`` of this rank's rows for every run, and whether scoring left the weights as they were."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import distribute_tensor

    from tests.adapters.ranks import build_worker

    worker = build_worker(config)
    engine, method = worker.actor.engine, worker.method
    layer = engine.module.model.layers[-1]

    def add(sign: int) -> None:
        for part in engine.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        with torch.no_grad():
            for key, weight in layer.named_parameters():
                change = sign * change_of(key, weight.shape)
                weight += distribute_tensor(change, weight.device_mesh, weight.placements)

    mine = pack(rows[rank * len(rows) // world : (rank + 1) * len(rows) // world], **{METHOD_CALL: 3})
    found, same = {}, []
    for name, settings in RUNS.items():
        run = Run(n=N, response_length=64, temperature=TEMPERATURE)
        settings = {"episodes": {"separator": " "}, "step_size": STEP_SIZE, **settings}
        method.settings = method.parse(settings, run)
        method.start_actor(worker.scoring_engine)
        sign = 0 if "unchanged" in name else 1
        add(sign)
        engine.__dict__.pop("tree_problem", None)
        if "dense" in name:
            engine.__dict__["tree_problem"] = "the test says so"
        before = weights(engine)
        fields = worker.score(mine)
        after = weights(engine)
        same.append(all(torch.equal(before[key], after[key]) for key in before))
        found[name] = [value.tolist() for value in fields["l2t_penalty"].unbind()]
        add(-sign)
    return found, same


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks, weights stay gathered"])
def scored(request: pytest.FixtureRequest, recipe_config: Callable, tiny_model: Path, tokenizer: Any) -> Any:
    config = recipe_config(
        *OVERRIDES,
        f"actor_rollout_ref.model.path={tiny_model}",
        f"actor_rollout_ref.rollout.temperature={TEMPERATURE}",
        f"actor_rollout_ref.actor.fsdp_config.reshard_after_forward={request.param == 1}",
    )
    ranks = run_on_ranks(request.param, score_on_ranks, config, make_rows(tokenizer))
    return {name: [row for found, _ in ranks for row in found[name]] for name in RUNS}, [same for _, same in ranks]


def expected(tiny_model: Path, tokenizer: Any) -> dict[str, list[list[float]]]:
    """C of every episode of every row, each response alone; the last row is not asked about."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    layer = model.model.layers[-1]
    with torch.no_grad():
        for key, weight in layer.named_parameters():
            weight += change_of(key, weight.shape)
    named = dict(layer.named_parameters())
    found: dict[str, list[list[float]]] = {"one_step": [], "released": []}
    for fields in make_rows(tokenizer)[:7]:
        prompt, response = fields["prompts"], fields["responses"]
        output = model(torch.cat([prompt, response])[None], output_hidden_states=True)
        states = output.hidden_states[-1][0, len(prompt) - 1 : -1]
        head = model.lm_head.weight.detach().clone().requires_grad_()
        spans = split_response(
            response.tolist(), TokenReader(tokenizer), end_ids={tokenizer.eos_token_id}, separator=" "
        ).spans
        one_step, released = [], []
        log_probs = (states @ head.T / TEMPERATURE).log_softmax(-1).gather(1, response[:, None])[:, 0]
        for start, end in spans:
            g, *slopes = torch.autograd.grad(log_probs[start:end].sum(), [head, *named.values()], retain_graph=True)
            one_step.append((STEP_SIZE * float(g.square().sum())) ** 2)
            pairs = zip(named, slopes, strict=True)
            released.append(0.01 * float(sum((change_of(key, g.shape) * g).sum() for key, g in pairs)) ** 2)
        found["one_step"].append(one_step)
        found["released"].append(released)
    return found


def test_penalties(scored: Any, tiny_model: Path, tokenizer: Any) -> None:
    """Packed or not, on any rank; a row about which nothing is asked has none; without a change the slope is 0."""
    found, same = scored
    wanted = expected(tiny_model, tokenizer)
    assert [len(row) for row in wanted["one_step"]] == [3, 2, 1, 3, 3, 2, 1]
    for name, rows in found.items():
        rows = [[value for value in row if not math.isnan(value)] for row in rows]
        assert rows.pop() == []
        for row, one_step, released in zip(rows, wanted["one_step"], wanted["released"], strict=True):
            if "one_step" in name:
                assert row == pytest.approx(one_step, rel=1e-4), name
            elif "unchanged" in name:
                assert row == [0.0] * len(released)
            else:
                largest = max(max(values) for values in wanted["released"])
                assert row == pytest.approx(released, rel=0.02, abs=1e-4 * largest), name
    assert same == [[True] * len(RUNS)] * len(same)
