"""Eq. 10 through our trainer's update, verl's worker and our engine: the same loss and gradient whatever the split.

The reference is ``tests/adapters/problem.py``: float64, plain loops, one sequence at a time. What this does not show is
where the batch comes from (``test_trainer.py``), nor vLLM and Ray (``tests/end_to_end``).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gcpo.adapters.term import UPDATE
from tests.adapters import problem
from tests.adapters.problem import KAPPA, PARTS, ROWS, SIZE
from tests.adapters.ranks import build_worker, pack, recorded_gradients, run_on_ranks, weights, with_changes

PADDING = 12
PADDING_LENGTH = 16
"""verl's padding rows have 128 tokens, which would leave no choice about the micro-batches of so small a batch."""
ONE, THREE = 1, 3

OVERRIDES = (
    "device=cpu",
    "gcpo.preset=balanced",
    "gcpo.collider.num_draws=2",
    f"gcpo.kappa={KAPPA}",
    f"gcpo.reference.max_kl={problem.MAX_KL}",
    "gcpo.metrics.grad_norm_every=0",
    f"actor_rollout_ref.rollout.n={SIZE}",
    f"actor_rollout_ref.actor.kl_loss_coef={problem.BETA}",
    f"actor_rollout_ref.actor.clip_ratio={problem.CLIP}",
    f"actor_rollout_ref.actor.clip_ratio_c={problem.DUAL_CLIP}",
)


@pytest.fixture(scope="module")
def rows(tiny_model: Path) -> list[dict[str, Any]]:
    return problem.make_rows(str(tiny_model))


@pytest.fixture(scope="module")
def config(tiny_model: Path, recipe_config: Any) -> Any:
    """The recipe's own configuration over the tiny model."""
    return recipe_config(*OVERRIDES, f"actor_rollout_ref.model.path={tiny_model}")


# ---- on a rank ----------------------------------------------------------------------------------------------------


def advantages(lengths: list[int], estimator: str, upsilon: torch.Tensor | None, form: str = "product") -> torch.Tensor:
    """B [rows, T], as verl's advantage stage asks its registry for it; rows beyond the problem's are padding rows."""
    import numpy as np
    from verl import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    from gcpo.adapters.registry import credited
    from gcpo.methods.gcpo.credit import CausalCredit

    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    rewards = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths[:ROWS]):
        mask[row, :length] = 1
        rewards[row, length - 1] = problem.REWARDS[row]
    keys = [f"g{row // SIZE}_{row % SIZE}_0" if row < ROWS else f"pad_{row}_0" for row in range(len(lengths))]
    data = DataProto.from_single_dict(
        {
            "token_level_rewards": rewards,
            "response_mask": mask,
            "uid": np.array([key.rsplit("_", 2)[0] for key in keys], dtype=object),
        }
    )
    credit = None
    if upsilon is not None:
        has_target = torch.arange(len(lengths)) < ROWS
        credit = CausalCredit(torch.cat([upsilon, torch.ones(len(lengths) - ROWS)]), has_target, form)
    with credited(credit):
        data = compute_advantage_for_multi_trajectories(data, keys, estimator, config={})
    return data.batch["advantages"]


def training_rows(
    rows: list[dict[str, Any]], padding: int = 0, estimator: str = "gcpo", upsilon: tuple | None = problem.UPSILON
) -> list[dict[str, torch.Tensor]]:
    """The rows as fields of the batch that is updated on, and verl's padding rows among them."""
    from verl.trainer.ppo import padding_utils

    fields = []
    for row in rows:
        response, lengths = row["response"], [len(context) for context in row["contexts"]]
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
                "ref_log_prob": row["ref"],
                "gcpo_contexts": torch.cat(row["contexts"]) if sum(lengths) else torch.zeros(1, dtype=torch.long),
                "gcpo_context_lengths": torch.tensor(lengths),
                "gcpo_log_ref": row["log_ref"],
                "gcpo_kl_mask": mask * int(row["has_reference"]),
                "gcpo_kl_weight": torch.tensor([row["kl_weight"]]),
            }
        )
    padding_utils.SYNTHETIC_PADDING_SEQ_LEN = PADDING_LENGTH
    for _ in range(padding):
        row, _ = padding_utils.construct_minimal_padding_template(fields[0], {}, 2)
        one = torch.zeros(1)
        row |= {"old_log_probs": one - 2, "ref_log_prob": one - 1, "gcpo_log_ref": one - 3, "gcpo_kl_mask": one.long()}
        # What the trainer leaves of the contexts of a padding row.
        row |= {"gcpo_contexts": torch.zeros(1, dtype=torch.long), "gcpo_context_lengths": torch.zeros(3).long()}
        fields.append({name: row[name] for name in fields[0]})
    lengths = [len(row["responses"]) for row in fields]
    weighted = advantages(lengths, estimator, None if upsilon is None else torch.tensor(upsilon))
    for row, length, values in zip(fields, lengths, weighted, strict=True):
        row["advantages"] = values[:length]
    # Padding rows fall between the others when verl balances the ranks.
    return fields[::2] + fields[1::2] if padding else fields


@contextmanager
def cut_into(engine: Any, micro: int) -> Iterator[list[int]]:
    """At least ``micro`` micro-batches for every pass of the engine; the sizes of those that there were."""
    from verl.workers.engine.fsdp import transformer_impl

    original, forward_step = transformer_impl.prepare_micro_batches, engine.forward_step
    sizes: list[int] = []

    def counted(micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(micro_batch))
        return forward_step(micro_batch, *args, **kwargs)

    transformer_impl.prepare_micro_batches = partial(original, min_num_micro_batch=micro)
    engine.forward_step = counted
    try:
        yield sizes
    finally:
        transformer_impl.prepare_micro_batches, engine.forward_step = original, forward_step


def update(
    config: Any,
    worker: Any,
    rank: int,
    world: int,
    fields: list[dict[str, torch.Tensor]],
    *,
    minis: int = 1,
    micro: int = ONE,
    step: int = 1,
) -> dict[str, Any]:
    """Our trainer's update of the actor on these rows: mean loss and mean gradient of its optimizer steps.

    The worker group is this rank's worker with this rank's rows.
    """
    from transfer_queue import KVBatchMeta

    from gcpo.adapters import hooks
    from gcpo.adapters.trainer import MethodTrainer

    config = copy.deepcopy(config)
    config.actor_rollout_ref.actor.ppo_mini_batch_size = len(fields) // SIZE // minis
    if micro == THREE and config.gcpo.scoring.packing == "tree":
        # Packs are cut by tokens: one that holds little more than a sequence.
        config.gcpo.scoring.max_token_len_per_gpu = 40
    share = len(fields) // world

    def update_actor(batch: KVBatchMeta) -> Any:
        return worker.update_actor(pack(fields[rank * share :][:share], **copy.deepcopy(batch.extra_info)))

    trainer = object.__new__(MethodTrainer)
    trainer.config, trainer.global_steps = config, step
    trainer.method = hooks.make_method(config)
    adopt(worker, trainer.method)
    trainer.actor_rollout_wg = SimpleNamespace(update_actor=update_actor)
    tags = [{"seq_len": len(row["input_ids"])} for row in fields]
    keys = [str(i) for i in range(len(fields))]
    batch = KVBatchMeta(keys=keys, tags=tags, partition_id="train", fields=list(fields[0]))
    metrics: dict[str, Any] = {}
    engine = worker.actor.engine
    with cut_into(engine, micro) as sizes, recorded_gradients(engine) as gradients:
        trainer._update_actor(batch, metrics)
    assert UPDATE not in batch.extra_info
    mean = {name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]}
    return {
        "loss": metrics["actor/loss"],
        "gradient": mean,
        "steps": len(gradients),
        "micro_batches": sizes,
        "metrics": {name: float(value) for name, value in metrics.items()},
    }


def adopt(worker: Any, method: Any) -> None:
    """Let a worker train with the term of another method object, as if it had been started with its settings."""
    from gcpo.adapters.engine import GCPOFSDPEngine
    from gcpo.adapters.term import method_loss

    if not isinstance(worker.actor.engine, GCPOFSDPEngine):
        return  # verl's own, with its own loss
    term = worker.actor.engine.term = method.term()
    base = worker.loss_fn
    worker.actor.set_loss_fn(partial(method_loss, base=base, config=base.keywords["config"], term=term))


def table(rank: int, world: int, config: Any, packing: str, rows: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Every variant of the table, and a few beside it, on one worker with learning rate 0."""
    found: dict[Any, Any] = {"packing": packing, "world": world}
    config = copy.deepcopy(config)
    config.gcpo.scoring.packing = packing
    worker = build_worker(config)
    for micro, minis, padding in itertools.product((ONE, THREE), (1, 2), (0, PADDING)):
        fields = training_rows(rows, padding)
        found[micro, minis, padding] = update(config, worker, rank, world, fields, minis=minis, micro=micro)
    fields = training_rows(rows)
    every_step = copy.deepcopy(config)
    every_step.gcpo.metrics.grad_norm_every = 4
    found["not measured"] = update(every_step, worker, rank, world, fields, micro=THREE, step=3)
    found["measured"] = update(every_step, worker, rank, world, fields, micro=THREE, step=4)
    on_query = copy.deepcopy(config)
    on_query.gcpo.reference.policy_condition = "query"
    on_query.gcpo.metrics.grad_norm_every = 1
    found["query"] = update(on_query, worker, rank, world, fields, micro=THREE)
    token_mean = with_changes(
        config, {"actor.loss_agg_mode": "token-mean", "actor.fsdp_config.use_no_sync_for_gradient_accumulation": True}
    )
    worker = build_worker(token_mean)
    found["token mean"] = update(token_mean, worker, rank, world, fields, micro=THREE)
    tight = with_changes(config, {"model.use_remove_padding": True, "actor.ppo_max_token_len_per_gpu": 30})
    tight.gcpo.scoring.max_token_len_per_gpu = 20 if packing == "dense" else 40
    worker = build_worker(tight)
    found["packed"] = update(tight, worker, rank, world, fields)
    by_number = {"actor.use_dynamic_bsz": False, "actor.ppo_micro_batch_size_per_gpu": 1}
    by_number |= {"rollout.log_prob_use_dynamic_bsz": False, "rollout.log_prob_micro_batch_size_per_gpu": 1}
    single = with_changes(config, by_number)
    found["single"] = update(single, build_worker(single), rank, world, fields)
    return found


# ---- the table ----------------------------------------------------------------------------------------------------

VARIANTS = list(itertools.product((ONE, THREE), (1, 2), (0, PADDING)))


@pytest.fixture(
    scope="module",
    params=itertools.product((1, 2), ("tree", "dense")),
    ids=lambda param: f"{param[0]} ranks, {param[1]}",
)
def found(request: pytest.FixtureRequest, config: Any, rows: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The table on one rank and on two."""
    world, packing = request.param
    results = run_on_ranks(world, table, config, packing, rows)
    for other in results[1:]:
        for key, value in other.items():
            assert (
                value == results[0][key]
                if isinstance(key, str) and key in ("packing", "world")
                else (value["loss"] == results[0][key]["loss"])
            )
    return results[0]


def assert_equal(result: dict[str, Any], parts: dict[str, Any], scale: float = 1.0, tolerance: float = 2e-5) -> None:
    loss, gradient = problem.together(parts)
    assert result["loss"] == pytest.approx(scale * loss, rel=tolerance)
    assert set(result["gradient"]) == set(gradient)
    for name, wanted in gradient.items():
        gap = (result["gradient"][name].double() - scale * wanted).norm() / (scale * wanted).norm()
        assert gap < tolerance, f"{name}: relative difference {gap:.1e}"


@pytest.fixture(scope="module")
def parts(tiny_model: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return problem.objective(str(tiny_model), rows)


@pytest.mark.parametrize(("micro", "minis", "padding"), VARIANTS)
def test_eq_10_whatever_the_split(found: dict, parts: dict, micro: int, minis: int, padding: int) -> None:
    """{1, 3 micro-batches} x {1, 2 mini-batches} x {1, 2 ranks} x {padding rows, none} all give Eq. 10.

    verl divides by the rows of a full batch, so padding rows in the place of lost responses scale it, as they should.
    """
    result = found[micro, minis, padding]
    assert result["steps"] == minis
    # verl's rows, and those of the term.
    packs = len(result["micro_batches"]) - micro * minis
    if found["packing"] == "dense":
        referenced = [i for i in range(ROWS) if i not in (problem.WITHOUT_REFERENCE, problem.WITHOUT_CONTEXTS)]
        assert packs >= len(referenced) / found["world"]
    else:
        assert packs == minis if micro == ONE else packs >= 2 * minis
    assert_equal(result, parts, scale=ROWS / (ROWS + padding))


@pytest.mark.parametrize("minis", [1, 2])
def test_tokens_trained(found: dict, rows: list[dict[str, Any]], minis: int) -> None:
    """Tokens of a step, over all its updates and ranks; packed, the 11 that a group's contexts share count once."""
    metrics = found[ONE, minis, 0]["metrics"]
    assert metrics["gcpo/tokens/trained/plain"] == sum(len(row["prompt"]) + len(row["response"]) for row in rows)
    chosen = [row for row in rows if row["has_reference"]]
    dense = sum(len(problem.used_context(row)) + len(row["response"]) for row in chosen)
    if found["packing"] == "dense":
        # A rank whose mini-batch has fewer rows with a reference fills up with rows of two tokens.
        size = ROWS // (found["world"] * minis)
        counts = [sum(row["has_reference"] for row in rows[at : at + size]) for at in range(0, ROWS, size)]
        ranks = [counts[at : at + minis] for at in range(0, len(counts), minis)]
        wanted = dense + 2 * sum(max(numbers) * len(numbers) - sum(numbers) for numbers in zip(*ranks, strict=True))
    else:
        wanted = dense - 11 * (len(chosen) - problem.GROUPS)
    assert metrics["gcpo/tokens/trained/kappa_rows"] == wanted


def test_every_part_matters(parts: dict) -> None:
    """The problem itself: no part is so small that its loss or gradient could be wrong unseen."""
    sizes = [norm(gradient) for _, gradient in parts.values()]
    assert min(sizes) > 0.02 * max(sizes)
    assert all(abs(loss) > 1e-3 for loss, _ in parts.values())


def test_token_mean_and_deferred_gradients(found: dict, tiny_model: Path, rows: list[dict[str, Any]]) -> None:
    """``token-mean`` divides every part by the tokens of the plain rows; so it is where FSDP reduces gradients once per
    pass (``use_no_sync_for_gradient_accumulation``)."""
    result = found["token mean"]
    assert len(result["micro_batches"]) >= 2 * THREE
    assert_equal(result, problem.objective(str(tiny_model), rows, token_mean=True))


def test_packed_rows_and_tight_budgets(found: dict, parts: dict) -> None:
    """Without padding tokens (``use_remove_padding``, verl's default on a GPU), and with micro-batches cut by a token
    budget that is less than a conditioned row (a pack: little more than one), it is the same objective."""
    assert len(found["packed"]["micro_batches"]) > 2 * THREE
    assert_equal(found["packed"], parts)


def test_one_row_at_a_time(found: dict, parts: dict) -> None:
    """Without ``use_dynamic_bsz`` every micro-batch holds one row, of verl's and of the dense ones."""
    if found["packing"] == "dense":
        assert set(found["single"]["micro_batches"]) == {1}
    assert_equal(found["single"], parts)


def test_policy_context_query(found: dict, tiny_model: Path, rows: list[dict[str, Any]]) -> None:
    """``policy_condition: query`` puts pi_theta(. | q) under the reference, in one pass over the plain rows."""
    result, wanted = found["query"], problem.objective(str(tiny_model), rows, kappa_context="query")
    assert len(result["micro_batches"]) == THREE * (1 + len(PARTS))  # three passes measure the parts
    assert_equal(result, wanted)
    assert_norms(result, wanted)


# ---- what a run may add to the model ---------------------------------------------------------------------------------

MODELS = {
    "checkpointing": {"model.enable_gradient_checkpointing": True},
    "lora": {"model.lora_rank": 4, "model.lora_alpha": 8, "model.target_modules": "all-linear"},
    "bf16": {f"actor.fsdp_config.mixed_precision.{kind}_dtype": "bf16" for kind in ("param", "buffer")},
}


def with_model(rank: int, world: int, config: Any, rows: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """One update for each packing, on a model with the changes of that name."""
    found = {}
    for packing in ("tree", "dense"):
        changed = with_changes(config, MODELS[name])
        changed.gcpo.scoring.packing = packing
        worker = build_worker(changed)
        engine = worker.actor.engine
        assert engine.tree_problem is None
        generator = torch.Generator().manual_seed(0)
        for parameter_name, parameter in sorted(engine.module.named_parameters()):
            if "lora_" in parameter_name:  # A is random, and B zeros, over which A would have no gradient
                with torch.no_grad():
                    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                    local.copy_(0.05 * torch.randn(local.shape, generator=generator))
        found[packing] = update(changed, worker, rank, world, training_rows(rows), micro=THREE)
    return found


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| over all parameters of ``a``."""
    return norm({name: a[name].double() - b[name].double() for name in a}) / norm({n: b[n].double() for n in a})


def test_gradient_checkpointing(config: Any, rows: list[dict[str, Any]], parts: dict) -> None:
    """Layers that run again in the backward pass."""
    for result in run_on_ranks(1, with_model, config, rows, "checkpointing")[0].values():
        assert_equal(result, parts)


def test_adapters_over_packed_trees(config: Any, rows: list[dict[str, Any]], parts: dict) -> None:
    """LoRA: packed trees give the adapters the gradients of rows by themselves."""
    found = run_on_ranks(1, with_model, config, rows, "lora")[0]
    tree, dense = found["tree"], found["dense"]
    assert tree["gradient"] and all("lora_" in name for name in tree["gradient"])
    assert all(float(gradient.abs().max()) > 0 for gradient in tree["gradient"].values())
    assert tree["loss"] == pytest.approx(dense["loss"], rel=2e-5)
    assert tree["loss"] != pytest.approx(problem.together(parts)[0], rel=1e-2)  # the adapters are in the model
    assert distance(tree["gradient"], dense["gradient"]) < 2e-5


def test_bfloat16(config: Any, rows: list[dict[str, Any]], parts: dict) -> None:
    """FSDP2's mixed precision: packed trees are no further from Eq. 10 than rows by themselves.

    The format moves ratios across the clip, so the gradients of this problem are far from the exact ones either way.
    """
    found = run_on_ranks(1, with_model, config, rows, "bf16")[0]
    loss, exact = problem.together(parts)
    gaps = {packing: distance(result["gradient"], exact) for packing, result in found.items()}
    assert 1e-4 < gaps["tree"] < 1.2 * gaps["dense"], gaps
    assert distance(found["tree"]["gradient"], found["dense"]["gradient"]) < gaps["dense"]
    assert found["tree"]["loss"] == pytest.approx(loss, rel=0.05)


def norm(gradient: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


def assert_norms(result: dict[str, Any], parts: dict[str, Any]) -> None:
    for part, (_, gradient) in parts.items():
        assert result["metrics"][f"gcpo/grad_norm/{part}"] == pytest.approx(norm(gradient), rel=1e-4)


def test_measured_gradient_norms(found: dict, parts: dict) -> None:
    """Every k-th step the norm of each part's own gradient is measured, and the step is the same bit for bit."""
    plain, measured = found["not measured"], found["measured"]
    assert not [name for name in plain["metrics"] if "grad_norm/" in name]
    assert_norms(measured, parts)
    assert measured["loss"] == plain["loss"]
    assert all(torch.equal(measured["gradient"][name], plain["gradient"][name]) for name in plain["gradient"])
    unmeasured = {name: value for name, value in measured["metrics"].items() if "gcpo/grad_norm/" not in name}
    same = [name for name in unmeasured if not name.startswith(("perf/", "actor/perf/"))]
    assert {name: unmeasured[name] for name in same} == {name: plain["metrics"][name] for name in same}


def test_metrics_of_the_update(found: dict, parts: dict) -> None:
    """``gcpo/kl_loss`` is the mean of KL' (without kappa), summed over micro-batches and ranks, beside verl's own."""
    for variant in ((ONE, 1, 0), (THREE, 1, 0)):
        metrics = found[variant]["metrics"]
        assert metrics["gcpo/kl_loss"] == pytest.approx(parts["kappa"][0] / KAPPA, rel=1e-4)
        assert metrics["actor/kl_loss"] == pytest.approx(parts["beta"][0] / problem.BETA, rel=1e-4)
        assert metrics["actor/pg_loss"] == pytest.approx(parts["policy"][0], rel=1e-4)


# ---- LoRA, and a reference policy of its own -----------------------------------------------------------------------


def row_log_probs(worker: Any, fields: list[dict[str, torch.Tensor]], **options: Any) -> list[torch.Tensor]:
    """log pi(response | prompt) from the worker that verl asks for old and reference log-probabilities."""
    from verl.workers.utils.padding import response_from_nested

    data = pack(fields, temperature=1.0, calculate_entropy=False, compute_loss=False, **options)
    compute = worker.compute_log_prob if worker.actor is not None else worker.compute_ref_log_prob
    return response_from_nested(compute(data)["log_probs"], data["response_mask"]).unbind()


def lora(rank: int, world: int, config: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    worker = build_worker(with_changes(config, {"model.lora_rank": 4, "model.lora.merge": True}), lr=0.05)
    fields = training_rows(rows)
    before = weights(worker.actor.engine)
    results = [update(config, worker, rank, world, fields, micro=THREE) for _ in range(2)]
    merged = dict(worker.actor.engine.get_per_tensor_param()[0])
    return {
        "before": before,
        "after": weights(worker.actor.engine),
        "trained": list(results[0]["gradient"]),
        "kl_loss": [result["metrics"]["gcpo/kl_loss"] for result in results],
        "policy": row_log_probs(worker, fields),
        "reference": row_log_probs(worker, fields, no_lora_adapter=True),
        "merged": {name: tensor.float() for name, tensor in merged.items()},
        "gradient": results[1]["gradient"],
    }


def test_lora(config: Any, rows: list[dict[str, Any]], tiny_model: Path) -> None:
    """LoRA, merged for vLLM: both passes train the adapter alone, and the actor without it is the reference."""
    result = run_on_ranks(2, lora, config, rows)[0]
    assert result["trained"] and all("lora_" in name for name in result["trained"])
    for name, value in result["before"].items():
        assert torch.equal(value, result["after"][name]) == ("lora_" not in name), name
    assert result["kl_loss"][0] != result["kl_loss"][1]
    model = problem.double_model(str(tiny_model))
    with torch.no_grad():
        wanted = [problem.log_probs(model, row["prompt"], row["response"]) for row in rows]
    for found, policy, right in zip(result["reference"], result["policy"], wanted, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(policy, found, atol=1e-2)
    # What vLLM is given is the base weight plus the adapter (verl sends it in bfloat16).
    name = "model.layers.0.self_attn.q_proj"
    base, a, b = (
        result["after"][f"base_model.model.{name}.{part}.weight"]
        for part in ("base_layer", "lora_A.default", "lora_B.default")
    )
    torch.testing.assert_close(result["merged"][f"{name}.weight"], base + 16 / 4 * b @ a, rtol=1e-2, atol=1e-2)


def own_reference(rank: int, world: int, config: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    fields = training_rows(rows)
    actor, reference = build_worker(config, lr=0.05), build_worker(config, "ref")
    update(config, actor, rank, world, fields)
    found = {"policy": row_log_probs(actor, fields), "reference": row_log_probs(reference, fields)}
    found["engine"] = type(reference.ref.engine).__name__
    for row, values in zip(fields, found["reference"], strict=True):
        row["ref_log_prob"] = values
    fresh = build_worker(config)
    return found | {"step": update(config, fresh, rank, world, fields)}


def test_a_reference_policy_of_its_own(config: Any, rows: list[dict[str, Any]], tiny_model: Path) -> None:
    """The reference worker keeps the first weights while the actor trains, and its values are what beta pulls to."""
    result = run_on_ranks(1, own_reference, config, rows)[0]
    assert result["engine"] == "GCPOFSDPEngine"
    model = problem.double_model(str(tiny_model))
    first = []
    for row, found, policy in zip(rows, result["reference"], result["policy"], strict=True):
        with torch.no_grad():
            right = problem.log_probs(model, row["prompt"], row["response"])
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(policy, found, atol=1e-2)
        first.append({**row, "ref": found})
    assert_equal(result["step"], problem.objective(str(tiny_model), first))


# ---- with everything of GCPO off -----------------------------------------------------------------------------------


def three_updates(rank: int, world: int, config: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Three updates of verl's own engine, loss and GRPO, and of ours with both ways to switch GCPO off."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.utils.losses import ppo_loss

    from gcpo.adapters.trainer import MethodTrainer

    off = {"kappa": 0.0, "weighting": {"target": "off"}}
    runs = []
    for name, gcpo, estimator, upsilon in (
        ("verl", off, "grpo", None),
        ("off", off, "gcpo", None),
        ("one", {"kappa": 0.0}, "gcpo", (1.0,) * ROWS),
    ):
        settings = copy.deepcopy(config)
        settings.gcpo = OmegaConf.merge(settings.gcpo, gcpo)
        fields = [
            {key: value for key, value in row.items() if not key.startswith("gcpo")}
            for row in training_rows(rows, estimator=estimator, upsilon=upsilon)
        ]
        ours = MethodTrainer._update_actor
        if name == "verl":
            worker = build_worker(
                with_changes(settings, {"actor.policy_loss.loss_mode": "vanilla"}),
                lr=1e-2,
                engine_class=FSDPEngineWithLMHead,
            )
            worker.actor.set_loss_fn(partial(ppo_loss, config=worker.loss_fn.keywords["config"]))
            MethodTrainer._update_actor = PPOTrainerSync._update_actor
        else:
            worker = build_worker(settings, lr=1e-2)
        try:
            results = [
                update(settings, worker, rank, world, fields, minis=2, micro=THREE, step=step) for step in (1, 2, 3)
            ]
        finally:
            MethodTrainer._update_actor = ours
        runs.append(
            {
                "engine": type(worker.actor.engine).__name__,
                "loss": type(worker.actor.loss_fn.keywords.get("base")).__name__,
                "losses": [result["loss"] for result in results],
                "gradients": [result["gradient"] for result in results],
                "advantages": [row["advantages"] for row in fields],
                "weights": weights(worker.actor.engine),
            }
        )
    return runs


def test_without_gcpo_everything_is_verls_bit_for_bit(config: Any, rows: list[dict[str, Any]]) -> None:
    """kappa = 0 and weighting off, or Upsilon = 1: advantages, losses, gradients and weights of six optimizer steps
    equal verl's own engine, loss and GRPO exactly."""
    verl, *others = run_on_ranks(1, three_updates, config, rows)[0]
    assert verl["engine"] == "FSDPEngineWithLMHead" and verl["loss"] == "NoneType"
    assert len(set(verl["losses"])) == 3
    for ours in others:
        assert ours["engine"] == "GCPOFSDPEngine" and ours["loss"] == "partial"
        assert all(map(torch.equal, verl["advantages"], ours["advantages"]))
        assert verl["losses"] == ours["losses"]
        for mine, theirs in zip(ours["gradients"], verl["gradients"], strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert all(torch.equal(ours["weights"][name], value) for name, value in verl["weights"].items())
