"""Eq. 10 on the real engine: loss and gradient whatever the split, against a float64 reference written with loops."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.ranks import actor_config, build_engine, full, gradients, loss_function, pack, run_on_ranks

BETA, KAPPA, MAX_KL = 0.04, 0.5, 10.0
GLOBAL_ROWS = 8
CLIP = 0.2


def log_probs(model: Any, context: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """log pi(response | context), one sequence at a time."""
    logits = model(torch.cat([context, response])[None]).logits[0]
    start = len(context) - 1
    return logits[start : start + len(response)].log_softmax(-1).gather(-1, response[:, None])[:, 0]


def make_rows(path: str) -> list[dict[str, Any]]:
    """Eight responses; one of length 1, one without a reference, ratios on both sides of the clip."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, 320, (length,), generator=generator)

    def noise(like: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * torch.randn(like.shape, generator=generator, dtype=torch.float64)

    rows = []
    for i, length in enumerate((7, 1, 5, 9, 3, 6, 2, 8)):
        prompt, response = tokens(4 + i % 3), tokens(length)
        contexts = [tokens(12 + i), tokens(15)]
        if i == 2:
            contexts[0] = contexts[0][:0]
        with torch.no_grad():
            on_query = log_probs(model, prompt, response)
            on_context = log_probs(model, next(c for c in contexts if len(c)), response)
        rows.append(
            {
                "prompt": prompt,
                "response": response,
                "contexts": contexts,
                "old": on_query + noise(on_query, 0.25),
                "ref": on_query + noise(on_query, 0.5),
                "log_ref": on_context + noise(on_context, 0.7),
                "has_reference": i != 4,
                "advantage": (-1) ** i * (0.4 + 0.3 * i),
            }
        )
    return rows


def reference(path: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss and gradient of every part of Eq. 10, in float64 with plain loops."""
    from transformers import AutoModelForCausalLM

    found: dict[str, Any] = {}
    for part in ("policy", "beta", "kappa"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            context = row["prompt"] if part != "kappa" else next(c for c in row["contexts"] if len(c))
            if part == "kappa" and not row["has_reference"]:
                continue
            logp = log_probs(model, context, row["response"])
            for j in range(len(logp)):
                if part == "policy":
                    ratio, advantage = (logp[j] - row["old"][j]).exp(), row["advantage"]
                    term = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
                    if advantage < 0:  # verl's dual clip
                        term = torch.minimum(term, torch.tensor(-3.0 * advantage, dtype=torch.float64))
                elif part == "beta":
                    gap = row["ref"][j] - logp[j]
                    term = BETA * (gap.exp() - gap - 1)
                else:
                    gap = row["log_ref"][j] - logp[j]
                    term = KAPPA * (gap.exp() - gap - 1).clamp(max=MAX_KL)
                total = total + term / len(logp) / GLOBAL_ROWS
        total.backward()
        found[part] = (total.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return found


def batch_rows(rows: list[dict[str, Any]], padding: int) -> list[dict[str, torch.Tensor]]:
    """The rows as fields of a worker's batch, and ``padding`` rows whose masks are zero, like verl's."""
    fields = []
    for i in range(len(rows) + padding):
        row, real = rows[i % len(rows)], i < len(rows)
        mask = torch.full_like(row["response"], int(real))
        sequence = torch.cat([row["prompt"], row["response"]])
        fields.append(
            {
                "prompts": row["prompt"],
                "responses": row["response"],
                "response_mask": mask,
                "loss_mask": mask,
                "input_ids": sequence,
                "position_ids": torch.arange(len(sequence)),
                "old_log_probs": row["old"].float(),
                "ref_log_prob": row["ref"].float(),
                "advantages": torch.full_like(row["old"], row["advantage"]).float(),
                "gcpo_contexts": torch.cat(row["contexts"]),
                "gcpo_context_lengths": torch.tensor([len(c) for c in row["contexts"]]),
                "gcpo_log_ref": row["log_ref"].float(),
                "gcpo_kl_mask": mask * int(row["has_reference"]),
            }
        )
    return fields


def settings(budget: int, config: Any, parts: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    return {
        "kappa": KAPPA,
        "max_kl": MAX_KL,
        "policy_context": "collider",
        "num_shared": 2,
        "loss_agg_mode": config.loss_agg_mode,
        "loss_scale_factor": None,
        "max_token_len_per_gpu": budget,
        "measure_parts": list(parts),
        **changes,
    }


def step(
    engine: Any, rank: int, world: int, fields: list[dict], *, minis: int, budget: int, config: Any, **options: Any
) -> tuple[float, dict[str, torch.Tensor], dict[str, Any]]:
    """Mean loss and mean gradient over the mini-batches, each one optimizer step with learning rate 0."""
    local = fields[rank::world]
    size = len(local) // minis
    losses, grads, metrics = [], [], {}
    with engine.train_mode():
        for k in range(minis):
            batch = pack(
                local[k * size : (k + 1) * size],
                use_dynamic_bsz=True,
                max_token_len_per_gpu=budget,
                global_batch_size=GLOBAL_ROWS // minis,
                gcpo=settings(budget, config, **options),
            )
            output = engine.train_batch(batch, loss_function(config))
            loss = torch.tensor(sum(output["loss"]), dtype=torch.float64)
            torch.distributed.all_reduce(loss)
            losses.append(loss.item() / world)
            grads.append(gradients(engine))
            metrics = output["metrics"]
    mean = {name: sum(g[name] for g in grads) / minis for name in grads[0]}
    return sum(losses) / minis, mean, metrics


def table(rank: int, world: int, path: str, rows: list[dict[str, Any]]) -> dict[Any, Any]:
    config = actor_config()
    engine = build_engine(path)
    found = {}
    for (label, budget), minis, padding in itertools.product((("one", 4096), ("many", 40)), (1, 2), (0, 4)):
        fields = batch_rows(rows, padding)
        loss, grads, _ = step(engine, rank, world, fields, minis=minis, budget=budget, config=config)
        found[label, minis, padding] = (loss, grads)
    loss, grads, metrics = step(
        engine, rank, world, batch_rows(rows, 0), minis=1, budget=4096, config=config, parts=("policy", "beta", "kappa")
    )
    found["measured"] = (loss, grads, {k: v for k, v in metrics.items() if "grad_norm/" in k})
    return found


@pytest.fixture(scope="module")
def problem(tiny_model: Path) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    rows = make_rows(str(tiny_model))
    return str(tiny_model), rows, reference(str(tiny_model), rows)


def expected(parts: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    names = set().union(*(grads for _, grads in parts.values()))
    total = {n: sum(grads[n] for _, grads in parts.values() if n in grads) for n in names}
    return sum(loss for loss, _ in parts.values()), total


def assert_same(found: tuple[float, dict], wanted: tuple[float, dict], tolerance: float) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=tolerance, abs=tolerance)
    for name, gradient in wanted[1].items():
        gap = (found[1][name].double() - gradient).norm() / gradient.norm()
        assert gap < tolerance, f"{name}: relative difference {gap:.2e}"


@pytest.mark.parametrize("world", [1, 2])
def test_eq_10_whatever_the_split(problem: tuple, world: int) -> None:
    """{1, many} micro-batches x {1, 2} mini-batches x ranks x {padding rows, none} all give Eq. 10 of the reference."""
    path, rows, parts = problem
    wanted = expected(parts)
    found = run_on_ranks(world, table, path, rows)[0]
    for variant in itertools.product(("one", "many"), (1, 2), (0, 4)):
        assert_same(found[variant], wanted, 2e-4)
    loss, grads, norms = found["measured"]
    plain_loss, plain_grads = found["one", 1, 0]
    assert loss == plain_loss and all(torch.equal(grads[n], plain_grads[n]) for n in grads), "measuring changed the step"
    for part, (_, gradient) in parts.items():
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
        assert norms[f"gcpo/grad_norm/{part}"] == [pytest.approx(norm, rel=1e-3)]


def on_query(rank: int, world: int, path: str, rows: list[dict[str, Any]]) -> Any:
    config, engine = actor_config(), build_engine(path)
    return step(
        engine, rank, world, batch_rows(rows, 0), minis=1, budget=60, config=config, policy_context="query"
    )[:2]


def test_policy_context_query(problem: tuple) -> None:
    """With ``policy_context: query`` the kappa term is over pi_theta(. | q), in the plain pass."""
    path, rows, parts = problem
    asked = [{**row, "contexts": [row["prompt"]]} for row in rows]
    wanted = expected({**parts, "kappa": reference(path, asked)["kappa"]})
    assert_same(run_on_ranks(1, on_query, path, rows)[0], wanted, 2e-4)


def with_lora(rank: int, world: int, path: str, rows: list[dict[str, Any]]) -> Any:
    config, engine = actor_config(), build_engine(path, lora_rank=4)
    _, grads, _ = step(engine, rank, world, batch_rows(rows, 0), minis=1, budget=4096, config=config)
    return {name: float(g.abs().max()) for name, g in grads.items()}


def test_lora_trains_the_adapter_alone(problem: tuple) -> None:
    """With LoRA every gradient, the kappa term's too, is in the adapter."""
    path, rows, _ = problem
    found = run_on_ranks(1, with_lora, path, rows)[0]
    assert found and all("lora_" in name for name in found)
    assert max(found.values()) > 0


def three_updates(rank: int, world: int, path: str, rows: list[dict[str, Any]]) -> bool:
    """Whether our engine, with nothing of GCPO on, trains exactly like verl's with verl's loss."""
    from functools import partial

    from verl.workers.config.actor import PolicyLossConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.utils.losses import ppo_loss

    ours = actor_config()
    verls = actor_config(policy_loss=PolicyLossConfig(loss_mode="vanilla"))
    losses = (loss_function(ours), partial(ppo_loss, config=verls))
    weights, values = [], []
    for cls, loss in zip((None, FSDPEngineWithLMHead), losses, strict=True):
        engine = build_engine(path, lr=1e-3, cls=cls)
        with engine.train_mode():
            for _ in range(3):
                fields = [{k: v for k, v in row.items() if "gcpo" not in k} for row in batch_rows(rows, 0)]
                batch = pack(fields, use_dynamic_bsz=True, max_token_len_per_gpu=40, global_batch_size=GLOBAL_ROWS)
                values.append(engine.train_batch(batch, loss)["loss"])
        weights.append({n: full(p.detach()) for n, p in engine.module.named_parameters()})
    return values[:3] == values[3:] and all(torch.equal(weights[0][n], weights[1][n]) for n in weights[1])


def test_without_gcpo_the_updates_are_verls_bit_for_bit(problem: tuple) -> None:
    """kappa = 0 and weighting off: losses and weights of three updates equal verl's own engine and loss exactly."""
    path, rows, _ = problem
    assert run_on_ranks(1, three_updates, path, rows) == [True]
