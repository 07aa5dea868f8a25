"""The scorer on the real engine against one sequence at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gcpo.adapters.scoring import PackScorer, can_share
from gcpo.methods.gcpo.scoring import score_rows
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.scoring.requests import Score, ScoreRequest
from tests.adapters.ranks import build_engine, run_on_ranks

PACKINGS = pytest.mark.parametrize("packing", ["tree", "dense"])


def make_requests(count: int) -> list[ScoreRequest]:
    """Requests of all kinds: log-probs alone, states alone, both, an empty context."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, 320, (length,), generator=generator)

    requests = []
    for i in range(count):
        context, target = tokens(3 + 5 * (i % 4)), tokens(1 + i % 6)
        kind = i % 4
        if kind == 0:
            requests.append(ScoreRequest(context, target, log_probs=True))
        elif kind == 1:
            requests.append(ScoreRequest(context[:0], target, state_at=len(target) - 1))
        elif kind == 2:
            requests.append(ScoreRequest(context, target, log_probs=True, state_at=len(context) - 1))
        else:
            requests.append(ScoreRequest(context, target[:0], state_at=len(context) - 1))
    return requests


def score(
    rank: int,
    world: int,
    path: str,
    packing: str,
    counts: tuple[int, ...],
    layer: int,
    budgets: tuple[int, ...],
) -> Any:
    engine = build_engine(path)
    head_positions: list[int] = []
    engine.module.lm_head.register_forward_hook(lambda m, args, out: head_positions.append(args[0].shape[1]))
    found = []
    with engine.eval_mode():
        for budget in budgets:
            scorer = PackScorer(
                engine,
                is_tree=can_share(engine, packing),
                min_shared=2,
                settings={"use_remove_padding": False, "use_fused_kernels": False},
                temperature=0.7,
                layer=layer,
                max_tokens=budget,
            )
            assert scorer.is_tree == (packing == "tree")
            head_positions.clear()
            scores = scorer(make_requests(counts[rank]))
            found.append([(s.log_probs, s.state) for s in scores])
    return found, head_positions


def expected(path: str, requests: list[ScoreRequest], layer: int) -> list[tuple]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    answers = []
    for request in requests:
        ids = torch.cat([request.context, request.target])
        with torch.no_grad():
            output = model(ids[None], output_hidden_states=True)
        log_probs = state = None
        if request.log_probs:
            start = len(request.context) - 1
            logits = output.logits[0, start : start + len(request.target)] / 0.7
            log_probs = logits.log_softmax(-1).gather(-1, request.target[:, None])[:, 0]
        if request.state_at is not None:
            state = output.hidden_states[layer][0, request.state_at]
        answers.append((log_probs, state))
    return answers


def assert_scores(found: list[tuple], wanted: list[tuple]) -> None:
    assert len(found) == len(wanted)
    for pair, answer in zip(found, wanted, strict=True):
        for value, right in zip(pair, answer, strict=True):
            assert (value is None) == (right is None)
            if right is not None:
                torch.testing.assert_close(value.double(), right, rtol=1e-4, atol=1e-4)


@PACKINGS
def test_scores_equal_one_at_a_time_for_any_budget(tiny_model: Path, packing: str) -> None:
    """Log-probs under the temperature and states after the final norm, whatever the token budget; in a tree the head
    works only on the places whose log-probs are wanted."""
    found, head = run_on_ranks(1, score, str(tiny_model), packing, (10,), -1, (4096, 45))[0]
    wanted = expected(str(tiny_model), make_requests(10), -1)
    for scores in found:
        assert_scores(scores, wanted)
    targets = sum(len(request.target) for request in make_requests(10) if request.log_probs)
    assert packing == "dense" or sum(head) == targets


@PACKINGS
def test_an_inner_layer(tiny_model: Path, packing: str) -> None:
    """``features.layer`` k is transformers' hidden state k."""
    found, _ = run_on_ranks(1, score, str(tiny_model), packing, (8,), 1, (4096,))[0]
    assert_scores(found[0], expected(str(tiny_model), make_requests(8), 1))


@PACKINGS
def test_ranks_with_different_numbers_of_requests(tiny_model: Path, packing: str) -> None:
    """A rank with fewer requests, or none, takes part in every collective and returns its own."""
    found = run_on_ranks(2, score, str(tiny_model), packing, (9, 0), -1, (45,))
    assert_scores(found[0][0][0], expected(str(tiny_model), make_requests(9), -1))
    assert found[1][0][0] == []


def states_alone(rank: int, world: int, path: str) -> Any:
    engine = build_engine(path)
    settings = {"use_remove_padding": False, "use_fused_kernels": False}
    options = {"settings": settings, "temperature": 0.7, "layer": -1, "max_tokens": 4096}
    scorer = PackScorer(engine, is_tree=True, min_shared=2, **options)
    with engine.eval_mode():
        return [(s.log_probs, s.state) for s in scorer(make_requests(10)[1::4])]


def test_states_alone(tiny_model: Path) -> None:
    """A pack in which no log-probability is wanted at all."""
    wanted = expected(str(tiny_model), make_requests(10)[1::4], -1)
    assert_scores(run_on_ranks(1, states_alone, str(tiny_model))[0], wanted)


def without_trees(rank: int, world: int, path: str) -> Any:
    import logging

    engine, said = build_engine(path), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("gcpo").addHandler(handler)
    settings = {"use_remove_padding": False, "use_fused_kernels": False}
    found = []
    with engine.eval_mode():
        for _ in range(2):
            options = {"settings": settings, "temperature": 0.7, "layer": -1, "max_tokens": 4096}
            scorer = PackScorer(engine, is_tree=can_share(engine, "tree"), min_shared=2, **options)
            found.append((scorer.is_tree, [(s.log_probs, s.state) for s in scorer(make_requests(8))]))
    return found, said


def test_a_model_that_trees_cannot_serve(tiny_model: Path, tmp_path: Path) -> None:
    """It is scored dense, and the log says so once, with the reason."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.use_sliding_window, model.config.sliding_window = True, 4096
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_model / name).exists():
            shutil.copy(tiny_model / name, tmp_path)
    found, said = run_on_ranks(1, without_trees, str(tmp_path))[0]
    for is_tree, scores in found:
        assert not is_tree
        assert_scores(scores, expected(str(tiny_model), make_requests(8), -1))
    about = [line for line in said if "without shared prefixes" in line]
    assert len(about) == 1 and "not full attention: sliding_attention" in about[0]


# ---- what a GPU uses by default --------------------------------------------------------------------------------------


def without_padding(rank: int, world: int, path: str, layer: int, budget: int) -> Any:
    """Dense scores, and the lengths of the model's rows."""
    engine = build_engine(path, use_remove_padding=True)
    shapes: list[tuple[int, ...]] = []
    engine.module.model.layers[0].register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape[:2]))
    )
    scorer = PackScorer(
        engine,
        is_tree=False,
        min_shared=2,
        settings={"use_remove_padding": engine.use_remove_padding, "use_fused_kernels": False},
        temperature=0.7,
        layer=layer,
        max_tokens=budget,
    )
    with engine.eval_mode():
        return [(s.log_probs, s.state) for s in scorer(make_requests(9))], shapes, engine.use_remove_padding


@pytest.mark.parametrize(("layer", "budget"), [(-1, 4096), (1, 45)])
def test_states_without_padding(tiny_model: Path, layer: int, budget: int) -> None:
    """``use_remove_padding``, verl's default on a GPU: the states and log-probs of one sequence at a time."""
    found, shapes, removed = run_on_ranks(1, without_padding, str(tiny_model), layer, budget)[0]
    assert removed and {rows for rows, _ in shapes} == {1}
    assert [tokens for _, tokens in shapes] == [len(r.context) + len(r.target) for r in make_requests(9)]
    assert_scores(found, expected(str(tiny_model), make_requests(9), layer))


TEMPERATURES = (0.6, 0.7, 1.0, 1.3)


def at_temperatures(rank: int, world: int, path: str) -> Any:
    """log p of one sequence in bfloat16 from verl's row, with and without padding, and from a pack, of equal logits."""
    from verl.utils import tensordict_utils as tu

    from gcpo.adapters.scoring import packed_batch
    from gcpo.scoring.rows import pack_rows

    found = {}
    ids = make_requests(4)[2].context
    ids = torch.cat([ids, ids.flip(0), ids])
    for removed in (False, True):
        engine = build_engine(path, dtype="bf16", use_remove_padding=removed)
        settings = {"use_remove_padding": removed, "use_fused_kernels": False}
        engine.tree_problem  # noqa: B018  (the probe runs with the model's own logits)
        logits = 6 * torch.randn(1, len(ids), 320, generator=torch.Generator().manual_seed(0))
        # A pack's logits stand at the places that predict, which are all but the last here.
        engine.module.lm_head.register_forward_hook(
            lambda module, args, output, logits=logits: logits[:, : output.shape[1]].to(output.dtype)
        )
        for temperature in TEMPERATURES:
            arguments = {"settings": settings, "temperature": temperature, "layer": -1, "max_tokens": 4096}
            request = ScoreRequest(ids[:1], ids[1:], log_probs=True)
            with engine.eval_mode():
                (dense,) = PackScorer(engine, is_tree=False, **arguments)([request])
                (tree,) = PackScorer(engine, is_tree=True, min_shared=2, **arguments)([request])
                batch = packed_batch(pack_rows([ids], [1], [0], budget=99, min_shared=2))
                tu.assign_non_tensor(batch, **settings, temperature=temperature)
                with engine.tree_attention():
                    raw = engine.infer_batch(batch)["model_output"]["log_probs"].unbind()[0]
            found[removed, temperature] = dense.log_probs, tree.log_probs, raw, logits
    return found


def test_the_temperature_is_rounded_as_verl_rounds_it(tiny_model: Path) -> None:
    """p_q, from verl's rows, and p_c, from packs, agree bit for bit in bfloat16 at every temperature."""
    found = run_on_ranks(1, at_temperatures, str(tiny_model))[0]
    assert len(found) == 2 * len(TEMPERATURES)
    for (_, temperature), (dense, tree, raw, logits) in found.items():
        assert torch.equal(dense, tree) and torch.equal(dense, raw.float()), temperature
        exact = (logits.bfloat16() / temperature).float()
        rounded = (logits.bfloat16() / torch.tensor(temperature).bfloat16()).float()
        assert (temperature == 1.0) == torch.equal(exact, rounded)  # the case tells them apart


class FakeScorer:
    """A state that names its sequence and place; log-probs that count the context."""

    tokens = 7

    def __call__(self, requests: list[ScoreRequest]) -> list[Score]:
        return [
            Score(
                torch.full((len(r.target),), -float(len(r.context))) if r.log_probs else None,
                None
                if r.state_at is None
                else torch.tensor([float(torch.cat([r.context, r.target])[r.state_at]), float(len(r.context))]),
            )
            for r in requests
        ]


def layout(weight: float = 1.0, end_ids: tuple[int, ...] = (2,), **changes: Any) -> dict[str, list[list[float]]]:
    preset = {"preset": "balanced", "features": {"source": "response", **changes.pop("features", {})}}
    config = GCPOConfig.from_config({**preset, **changes}, n=4, response_length=8)
    eos = 2
    row = {
        "prompts": torch.tensor([10, 11]),
        "responses": torch.tensor([20, 21, eos]),
        "gcpo_contexts": torch.tensor([30, 31, 32, 40]),
        "gcpo_context_lengths": torch.tensor([3, 0, 1]),
        "gcpo_kl_weight": torch.tensor([weight]),
        "gcpo_outputs": torch.tensor([50, 51, eos, 60]),
        "gcpo_output_lengths": torch.tensor([3, 0, 1]),
    }
    batch = score_rows({name: [value] for name, value in row.items()}, config, FakeScorer(), end_ids)
    return {name: [value[0].tolist()] for name, value in batch.items()}


def test_row_layout() -> None:
    """Places without a context or a generation are zeros; the others stand where they belong."""
    fields = layout()
    assert fields["gcpo_scored_tokens"] == [[7.0, 3.0, 3 + 1 + 2 * 3, 3 + 1]]
    assert fields["gcpo_z"] == [[2.0, 0.0]]
    assert fields["gcpo_z_regenerated"] == [[2.0, 0.0, 0.0, 0.0, 60.0, 0.0]]
    assert fields["gcpo_log_p"] == [[-3.0] * 3 + [0.0] * 3 + [-1.0] * 3]


def test_row_options() -> None:
    """Last content token, prompt and response, and the state at the end of the prompt."""
    assert layout(features={"token": "last_content"})["gcpo_z"] == [[21.0, 0.0]]
    assert layout(features={"token": "last_content"}, end_ids=(2, 21))["gcpo_z"] == [[20.0, 0.0]]
    fields = layout(features={"input": "prompt_response"})
    assert fields["gcpo_z"] == [[2.0, 2.0]]
    assert fields["gcpo_z_regenerated"] == [[2.0, 3.0, 0.0, 0.0, 60.0, 1.0]]
    assert layout(features={"source": "prompt"})["gcpo_z_regenerated"] == [[32.0, 3.0, 0.0, 0.0, 40.0, 1.0]]
    assert "gcpo_log_p" not in layout(kappa=0.0)
    assert layout(weight=0.0)["gcpo_log_p"] == [[0.0] * 9]
    assert layout(weight=0.0, features={"source": "prompt"})["gcpo_z_regenerated"] == [[32.0, 3.0, 0.0, 0.0, 40.0, 1.0]]
