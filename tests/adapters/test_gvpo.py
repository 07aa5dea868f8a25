"""GVPO through our trainer's update, verl's worker and our engine: the gradient of every step is that of its loss.

The reference is `gvpo_loss` of whole groups in float64, over an unsharded model with the weights before the step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transfer_queue import KVBatchMeta

from gcpo.algorithms import gvpo_loss
from gcpo.faults import RunStoppedError
from gcpo.methods.base import Run
from gcpo.methods.gvpo.method import GVPO
from gcpo.settings import ConfigError
from tests.adapters import problem
from tests.adapters.ranks import build_worker, full, pack, run_on_ranks

N = problem.SIZE
BETA = 0.1
REWARDS = (1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.25, 0.0, 1.0, 0.0, 0.0, 1.0)
"""The first group has equal rewards, and no gradient before the first step."""


@pytest.fixture(scope="module")
def rows(tiny_model: Path) -> list[dict[str, Any]]:
    """Twelve responses to four questions, with the log-probabilities of the model itself."""
    model, rows = problem.double_model(str(tiny_model)), problem.make_rows(str(tiny_model))
    with torch.no_grad():
        return [
            {
                "key": f"g{i // N}_{i % N}_0",
                "prompt": row["prompt"],
                "response": row["response"],
                "old": problem.log_probs(model, row["prompt"], row["response"]).float(),
            }
            for i, row in enumerate(rows)
        ]


@pytest.fixture(scope="module")
def config(tiny_model: Path, recipe_config: Any) -> Any:
    return recipe_config(
        "device=cpu",
        "method=gvpo",
        f"gvpo.beta={BETA}",
        f"actor_rollout_ref.rollout.n={N}",
        f"actor_rollout_ref.model.path={tiny_model}",
        "data.train_batch_size=4",
    )


# ---- on a rank -------------------------------------------------------------------------------------------------------


def fields_of(rows: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """The rows as they come to the update."""
    fields = []
    for i, row in enumerate(rows):
        response, group = row["response"], REWARDS[i - i % N : i - i % N + N]
        sequence, mask = torch.cat([row["prompt"], response]), torch.ones_like(response)
        fields.append(
            {
                "prompts": row["prompt"],
                "responses": response,
                "response_mask": mask,
                "loss_mask": mask,
                "input_ids": sequence,
                "position_ids": torch.arange(len(sequence)),
                "old_log_probs": row["old"],
                "advantages": torch.full((len(response),), REWARDS[i] - sum(group) / N),
                "gvpo_place": torch.tensor([i // N, i % N]),
            }
        )
    return fields


def update(
    rank: int, world: int, config: Any, rows: list[dict[str, Any]], minis: int, micro: int, epochs: int = 1
) -> dict[str, Any]:
    """Steps of a fresh worker: the rows, the weights and the gradient of each, the passes, and the metrics."""
    from gcpo.adapters import hooks
    from gcpo.adapters.mini_batches import whole_mini_batches
    from gcpo.adapters.trainer import MethodTrainer
    from tests.adapters.test_objective import cut_into

    config = copy.deepcopy(config)
    config.actor_rollout_ref.actor.ppo_mini_batch_size = len(rows) // N // minis
    config.actor_rollout_ref.actor.ppo_epochs = epochs
    worker, fields = build_worker(config, lr=1e-2), fields_of(rows)
    tags = [{"seq_len": len(row["input_ids"])} for row in fields]
    batch = KVBatchMeta(keys=[row["key"] for row in rows], tags=tags, partition_id="train", fields=list(fields[0]))
    order = whole_mini_batches(batch, N, len(rows) // N // minis, world)
    batch.reorder(order)
    share = len(rows) // world

    def update_actor(sent: KVBatchMeta) -> Any:
        assert set(sent.fields or ()) >= {"gvpo_place"}
        own = [fields[row] for row in order[rank * share :][:share]]
        return worker.update_actor(pack(own, **copy.deepcopy(sent.extra_info)))

    trainer = object.__new__(MethodTrainer)
    trainer.config, trainer.global_steps = config, 1
    trainer.method = hooks.make_method(config)
    trainer.actor_rollout_wg = SimpleNamespace(update_actor=update_actor)
    metrics: dict[str, Any] = {}
    worker.actor._updates = 9  # As an earlier batch left it.
    engine = worker.actor.engine
    steps, passes, step, infer = [], [], engine.optimizer_step, engine.infer_batch

    def optimizer_step() -> float:
        named = dict(engine.module.named_parameters())
        weights = {name: full(parameter.detach()) for name, parameter in named.items()}
        steps.append({"weights": weights, "gradient": {name: full(p.grad) for name, p in named.items()}})
        return step()

    def infer_batch(*args: Any, **kwargs: Any) -> Any:
        passes.append(len(steps))
        return infer(*args, **kwargs)

    engine.optimizer_step, engine.infer_batch = optimizer_step, infer_batch
    with cut_into(engine, micro) as sizes:
        trainer._update_actor(batch, metrics)
    part = share // minis
    for number, recorded in enumerate(steps):
        start = number % minis * part
        recorded["rows"] = [row for r in range(world) for row in order[r * share + start :][:part]]
    return {"steps": steps, "passes": passes, "sizes": sizes, "metrics": {k: float(v) for k, v in metrics.items()}}


# ---- the reference ---------------------------------------------------------------------------------------------------


def reference(path: str, rows: list[dict[str, Any]], step: dict[str, Any], beta: float = BETA) -> Any:
    """Mean loss over the questions of a mini-batch, its gradient, and the log-ratios by group."""
    model = copy.deepcopy(problem.double_model(path))
    model.load_state_dict({name: value.double() for name, value in step["weights"].items()}, strict=False)
    groups: dict[int, list[int]] = {}
    for row in step["rows"]:
        groups.setdefault(row // N, []).append(row)
    assert all(len(members) == N for members in groups.values())
    total, ratios = torch.zeros((), dtype=torch.float64), []
    for members in groups.values():
        ratio = torch.stack(
            [
                (problem.log_probs(model, rows[i]["prompt"], rows[i]["response"]) - rows[i]["old"].double()).sum()
                for i in members
            ]
        )
        ratios.append(ratio.detach())
        reward = torch.tensor([REWARDS[i] for i in members], dtype=torch.float64)
        total = total + gvpo_loss(reward, ratio, beta=beta) / len(groups)
    total.backward()
    return total.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, ratios


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b|."""
    assert a.keys() == b.keys()
    gap = math.sqrt(sum(float((a[n].double() - b[n]).square().sum()) for n in b))
    return gap / math.sqrt(sum(float(b[n].square().sum()) for n in b))


VARIANTS = [(1, 4, 1), (1, 2, 1), (1, 2, 3), (2, 2, 1), (2, 2, 3), (2, 1, 1)]
"""Ranks, mini-batches, least micro-batches. A single mini-batch has two epochs."""


@pytest.mark.parametrize(("world", "minis", "micro"), VARIANTS)
def test_the_gradient_of_every_step(
    config: Any, rows: list[dict[str, Any]], tiny_model: Path, world: int, minis: int, micro: int
) -> None:
    """Loss and gradient are those of whole groups under the weights before the step; the first step has no pass."""
    epochs = 2 if minis == 1 else 1
    results = run_on_ranks(world, update, config, rows, minis, micro, epochs)
    found = results[0]
    assert len(found["steps"]) == minis * epochs and len(found["sizes"]) >= micro * (2 * minis * epochs - 1)
    assert found["passes"] == list(range(1, minis * epochs))
    assert sorted(row for step in found["steps"][:minis] for row in step["rows"]) == list(range(len(rows)))
    losses, deviations = [], []
    for number, step in enumerate(found["steps"]):
        loss, gradient, ratios = reference(str(tiny_model), rows, step)
        assert distance(step["gradient"], gradient) < 1e-4, number
        losses.append(loss)
        deviations.append(torch.stack(ratios).std(1).mean())
        for other in results[1:]:
            assert all(torch.equal(other["steps"][number]["gradient"][n], g) for n, g in step["gradient"].items())
    metrics = found["metrics"]
    assert metrics["gvpo/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert metrics["gvpo/log_ratio_std"] == pytest.approx(float(sum(deviations[1:])) / (len(deviations) - 1), rel=1e-4)
    assert min(deviations[1:]) > 0.1, "the log-ratios are too small to be seen"
    assert 0 <= metrics["gvpo/log_ratio_at_old"] < 1e-4


def test_groups_are_shared_by_ranks(config: Any, rows: list[dict[str, Any]]) -> None:
    """The problem of the test above: a group lies on two ranks."""
    from gcpo.adapters.mini_batches import whole_mini_batches

    tags = [{"seq_len": len(row["prompt"]) + len(row["response"])} for row in rows]
    order = whole_mini_batches(KVBatchMeta(keys=[row["key"] for row in rows], tags=tags), N, 2, 2)
    assert {row // N for row in order[:6]} & {row // N for row in order[6:]}


# ---- the hook by hand ------------------------------------------------------------------------------------------------


def hook(
    rewards: list[float], log_ratio: list[float] | None, beta: float, split: int | None = None
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """The advantages of one group, whose rows from ``split`` on lie on another rank."""
    n = len(rewards)
    method = GVPO(GVPO.parse({"beta": beta}, run := Run(n=n, response_length=8)), run)
    mean = sum(rewards) / n
    lengths = [1 + i % 3 for i in range(n)]
    rows = {
        "gvpo_place": [torch.tensor([0, i]) for i in range(n)],
        "advantages": [torch.full((length,), r - mean) for r, length in zip(rewards, lengths, strict=True)],
        "old_log_probs": [torch.full((length,), -1.0) for length in lengths],
        "response_mask": [torch.ones(length, dtype=torch.long) for length in lengths],
    }
    new = None
    if log_ratio is not None:
        new = [old + ratio / len(old) for old, ratio in zip(rows["old_log_probs"], log_ratio, strict=True)]
        new[0] = torch.cat([new[0], torch.ones(1)])
    # A token of the first response that the loss does not read.
    for name, value in (("advantages", 0.0), ("old_log_probs", -5.0), ("response_mask", 0)):
        rows[name][0] = torch.cat([rows[name][0], torch.tensor([value], dtype=rows[name][0].dtype)])
    sent: list[Any] = []
    parts = [slice(0, split), slice(split, None)] if split else [slice(0, None)]

    def call(part: slice, gather: Callable) -> Any:
        metrics: dict[str, float] = {}
        own = {name: values[part] for name, values in rows.items()}
        engine: Any = SimpleNamespace(gather=gather)
        return method.before_mini_batch(own, None if new is None else new[part], engine, metrics), metrics

    def collect(values: list[Any]) -> Any:
        sent.extend(values)
        raise StopIteration

    for part in parts:
        with pytest.raises(StopIteration):
            call(part, collect)
    found = [call(part, lambda values: sent) for part in parts]
    advantages = [value for fields, _ in found for value in fields["advantages"]]
    return advantages, found[-1][1]


@pytest.mark.parametrize("split", [None, 1])
@pytest.mark.parametrize(
    ("beta", "rewards", "log_ratio", "gradient", "loss"),
    [
        (1.0, [1, 0], None, [-0.5, 0.5], 0.25),
        (0.1, [1, 0, 0, 1], [2, -1, 0, 3], [-0.04 / 3, 0.01, 0.04 / 3, -0.01], 0.25 / 3),
        (0.1, [1, 1, 1, 1], [1, 0, 0, -1], [0.01 / 3, 0, 0, -0.01 / 3], 0.01 / 3),
    ],
)
def test_by_hand(beta: float, rewards: list, log_ratio: Any, gradient: list, loss: float, split: int | None) -> None:
    """verl's loss has the gradient -advantage / n for every token, which is that of the loss of the group."""
    advantages, metrics = hook([float(r) for r in rewards], log_ratio, beta, split)
    assert advantages[0][-1] == 0
    advantages[0] = advantages[0][:-1]
    for values, wanted in zip(advantages, gradient, strict=True):
        assert values.dtype == torch.float32
        torch.testing.assert_close(-values / len(rewards), torch.full_like(values, wanted))
    assert metrics["gvpo/loss"] == pytest.approx(loss, rel=1e-6)
    assert ("gvpo/log_ratio_std" in metrics) == (log_ratio is not None)


def test_a_group_that_is_not_whole() -> None:
    method = GVPO(GVPO.parse({}, run := Run(n=3, response_length=8)), run)
    one = torch.ones(1)
    rows = {"gvpo_place": [torch.tensor([0, 0])], "advantages": [one], "old_log_probs": [one], "response_mask": [one]}
    engine: Any = SimpleNamespace(gather=lambda values: values)
    with pytest.raises(ValueError, match="1 of the 3 responses"):
        method.before_mini_batch(rows, None, engine, {})  # pyright: ignore[reportArgumentType]


# ---- the layout ------------------------------------------------------------------------------------------------------


def scattered(groups: int, n: int) -> KVBatchMeta:
    keys = [f"uid{group}_{session}_0" for session in range(n) for group in range(groups)]
    return KVBatchMeta(keys=keys, tags=[{"seq_len": 10 + (7 * k * k) % 90} for k in range(len(keys))])


@pytest.mark.parametrize(
    ("groups", "n", "questions", "ranks"), [(4, 4, 2, 1), (4, 4, 2, 8), (6, 3, 2, 2), (8, 2, 4, 4), (3, 2, 1, 2)]
)
def test_every_mini_batch_holds_whole_groups(groups: int, n: int, questions: int, ranks: int) -> None:
    from gcpo.adapters.mini_batches import whole_mini_batches

    batch = scattered(groups, n)
    order = whole_mini_batches(batch, n, questions, ranks)
    assert sorted(order) == list(range(groups * n))
    share, minis = groups * n // ranks, groups // questions
    for m in range(minis):
        size = share // minis
        keys = [batch.keys[row] for r in range(ranks) for row in order[r * share + m * size :][:size]]
        uids = [key.split("_")[0] for key in keys]
        assert len(set(uids)) == questions and all(uids.count(uid) == n for uid in uids)


@pytest.mark.parametrize("change", ["missing", "padding", "ranks", "questions"])
def test_a_batch_that_cannot_be_split(change: str) -> None:
    from gcpo.adapters.mini_batches import whole_mini_batches

    batch, questions, ranks = scattered(4, 3), 2, 2
    if change == "missing":
        batch = KVBatchMeta(keys=batch.keys[1:], tags=batch.tags[1:])
    if change == "padding":
        # In the place of a response: its group has the right size.
        batch = KVBatchMeta(keys=batch.keys, tags=[*batch.tags[:-1], {"seq_len": 5, "is_padding": True}])
    questions, ranks = (3, 2) if change == "questions" else (2, 4 if change == "ranks" else 2)
    with pytest.raises(RunStoppedError, match="cannot be split into mini-batches"):
        whole_mini_batches(batch, 3, questions, ranks)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_the_quick_start_passes(run_inputs: Path) -> None:
    """It has four mini-batches by itself, also with another batch; one is accepted by name, or with two epochs."""
    from gcpo.checks import check_run
    from tests.run_inputs import config_of

    of = partial(config_of, run_inputs, method="gvpo")
    config = of()
    assert check_run(config).beta == 0.1 and config.actor_rollout_ref.actor.ppo_mini_batch_size == 4
    assert of("data.train_batch_size=256").actor_rollout_ref.actor.ppo_mini_batch_size == 64
    assert of("data.train_batch_size=2").actor_rollout_ref.actor.ppo_mini_batch_size == 1
    one = "actor_rollout_ref.actor.ppo_mini_batch_size=16"
    assert check_run(of(one, "gvpo.allow_single_mini_batch=True")).allow_single_mini_batch
    check_run(of(one, "actor_rollout_ref.actor.ppo_epochs=2"))


ACTOR = "actor_rollout_ref.actor"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (f"{ACTOR}.ppo_mini_batch_size=16", f"the whole batch: .*; set {ACTOR}.ppo_mini_batch_size=4"),
        (f"{ACTOR}.shuffle=True", "must hold whole groups; set .*shuffle=False"),
        ("algorithm.rollout_correction.bypass_mode=True", "bypass_mode is True"),
        ("algorithm.rollout_correction.rollout_rs=token_k1", "rollout_rs is"),
        (
            "algorithm.rollout_correction.rollout_is=token actor_rollout_ref.rollout.calculate_log_probs=True",
            "rollout_is is 'token': its weights",
        ),
        ("actor_rollout_ref.rollout.n=1", "set n >= 2"),
        ("algorithm.norm_adv_by_std_in_grpo=True", "norm_adv_by_std_in_grpo is True: .*=False"),
        ("algorithm.use_kl_in_reward=True", "use_kl_in_reward is True"),
        (f"{ACTOR}.use_kl_loss=True", "use_kl_loss is True"),
        (f"{ACTOR}.entropy_coeff=0.01", "entropy_coeff is 0.01"),
        (f"{ACTOR}.policy_loss.loss_mode=vanilla", "loss_mode is 'vanilla': .*=gpg"),
        (f"{ACTOR}.loss_agg_mode=token-mean", "loss_agg_mode is 'token-mean': .*=seq-mean-token-sum"),
        (f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2", "sequence parallelism is not supported"),
        ("gvpo.beta=0", "gvpo.beta is 0; it must be greater than 0"),
    ],
)
def test_what_is_refused(run_inputs: Path, override: str, sentence: str) -> None:
    """In one sentence, before anything starts."""
    from gcpo.checks import check_run
    from tests.run_inputs import config_of

    with pytest.raises(ConfigError, match=sentence) as caught:
        check_run(config_of(run_inputs, *override.split(), method="gvpo"))
    assert "\n" not in str(caught.value)
