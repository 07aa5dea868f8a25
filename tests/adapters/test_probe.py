"""The probe of a loaded model on the real engine, over two ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gcpo.adapters.scoring import PackScorer, can_share
from tests.adapters.ranks import build_engine, build_worker, run_on_ranks
from tests.adapters.test_scoring import assert_scores, expected, make_requests

SETTINGS = {"use_remove_padding": False, "use_fused_kernels": False}


def _layer(engine: Any) -> torch.nn.Module:
    return engine.module.model.layers[1]


def none(engine: Any) -> None:
    """The model as it is."""


def shift(engine: Any) -> None:
    """A convolution along the row, as of a recurrent layer: every token gets a part of the one before it."""

    def mix(module: torch.nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        mixed = hidden + 0.3 * hidden.roll(1, dims=1) * (torch.arange(hidden.shape[1]) > 0)[:, None]
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    _layer(engine).register_forward_hook(mix)


def window(engine: Any) -> None:
    """A window that no configuration names and that is longer than the probe: only its keyword can be seen."""
    _layer(engine).self_attn.sliding_window = 4096


def crash(engine: Any) -> None:
    """A layer that fails on packs in the middle of the forward pass."""

    def fail(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("tree_pack") is not None:
            raise RuntimeError("the size of tensor a must match the size of tensor b")

    _layer(engine).register_forward_pre_hook(fail, with_kwargs=True)


def ignore(engine: Any) -> None:
    """A model that chooses its attention by itself."""
    for layer in engine.module.model.layers:
        layer.self_attn.config = SimpleNamespace(_attn_implementation="sdpa")


def one_rank(engine: Any) -> None:
    """A difference that one of the ranks sees."""
    from gcpo.adapters import probe

    original = probe._compare

    def compare(engine: Any, vocabulary: int) -> str | None:
        found = original(engine, vocabulary)
        return "this rank differs" if torch.distributed.get_rank() == 1 else found

    probe._compare = compare


CASES: dict[Callable[[Any], None], tuple[str, ...]] = {
    shift: ("in a probe of the loaded model the log-probabilities of packed sequences differ by up to ", "float32"),
    window: ("Qwen2Attention gives its attention function keywords", "sliding_window=4096"),
    crash: ("fails on a packed tree (RuntimeError: the size of tensor a must match",),
    ignore: ("does not call the attention function that it is given",),
    one_rank: ("this rank differs",),
    none: (),
}


@contextmanager
def warnings_of_ours() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("gcpo").addHandler(handler)
    yield said
    logging.getLogger("gcpo").removeHandler(handler)


def count_hooks(engine: Any) -> int:
    return sum(len(module._forward_hooks) for module in engine.module.modules())


def probed(rank: int, world: int, path: str) -> dict[str, Any]:
    """Returns the engine's verdict, its log lines, and the scores before and after, for every case."""
    from gcpo.adapters import probe

    found = {}
    compare = probe._compare
    for change in CASES:
        probe._compare = compare
        engine = build_engine(path)
        change(engine)
        arguments = {"settings": SETTINGS, "temperature": 0.7, "layer": -1, "max_tokens": 4096}
        with engine.eval_mode():
            before = PackScorer(engine, is_tree=False, **arguments)(make_requests(4))
        hooks = count_hooks(engine)
        with warnings_of_ours() as said:
            problem = engine.tree_problem
            hooks -= count_hooks(engine)
            with engine.eval_mode():
                shared = [can_share(engine, "tree") for _ in range(2)]
                scorers = [PackScorer(engine, is_tree=one, min_shared=2, **arguments) for one in shared]
                after = scorers[0](make_requests(4))
        same = all(
            torch.equal(a.log_probs, b.log_probs) for a, b in zip(before, after, strict=True) if a.log_probs is not None
        )
        scores = [(score.log_probs, score.state) for score in after]
        found[change.__name__] = (problem, said, scorers[0].is_tree, same, scores, hooks, engine.mode)
    return found


@pytest.fixture(scope="module")
def verdicts(tiny_model: Path) -> list[dict[str, Any]]:
    return run_on_ranks(2, probed, str(tiny_model))


@pytest.mark.parametrize("change", [change for change, parts in CASES.items() if parts])
def test_a_model_that_is_wrong_on_trees(verdicts: list[dict[str, Any]], change: Callable[[Any], None]) -> None:
    """All ranks agree, the first says the reason once, and sequences are scored one at a time as without the probe."""
    first, second = (rank[change.__name__] for rank in verdicts)
    assert first[0] == second[0] is not None
    assert all(part in first[0] for part in CASES[change]), first[0]
    assert [line.count(first[0]) for line in first[1]] == [1] and second[1] == []
    assert "without shared prefixes" in first[1][0]
    for _, _, is_tree, same, _, hooks, mode in (first, second):
        assert not is_tree and same and mode is None
        assert hooks == 0


def test_a_model_that_is_right(verdicts: list[dict[str, Any]], tiny_model: Path) -> None:
    """Nothing is said, and it is scored as trees."""
    for problem, said, is_tree, _, scores, hooks, mode in (rank["none"] for rank in verdicts):
        assert problem is None and said == [] and is_tree and hooks == 0 and mode is None
        assert_scores(scores, expected(str(tiny_model), make_requests(4), -1))


def half(rank: int, world: int, path: str) -> dict[str, str | None]:
    found = {}
    for change in (none, shift):
        engine = build_engine(path, dtype="bf16")
        change(engine)
        engine.optimizer_zero_grad()
        with engine.train_mode():
            found[change.__name__] = engine.tree_problem
            assert engine.mode == "train" and engine.module.training
    return found


def test_bfloat16_in_the_middle_of_training(tiny_model: Path) -> None:
    """The bound of the type keeps its rounding apart from a wrong layout; the engine goes on in its own mode."""
    (found,) = run_on_ranks(1, half, str(tiny_model))
    assert found["none"] is None
    assert "the bound in torch.bfloat16" in found["shift"]


def loaded(rank: int, world: int, config: Any) -> list[Any]:
    """What is probed when workers load their models, and what a worker of GC2PO says."""
    from omegaconf import open_dict

    from gcpo.adapters import engine as engine_module

    probes: list[int] = []

    def probe(engine: Any, vocabulary: int) -> str:
        probes.append(vocabulary)
        return "of a reason"

    engine_module.probe_trees = probe
    found = []
    for packing in ("tree", "dense"):
        config.gcpo.scoring.packing = packing
        engine = build_worker(config).actor.engine
        found.append(len(probes))
        if packing == "tree":
            assert engine.tree_problem == "of a reason"
            found.append(len(probes))
    with open_dict(config):
        config.trainer.v1.trainer_mode = "gc2po"
    try:
        build_worker(config)
    except RuntimeError as error:
        found.append(str(error))
    return found


def test_before_training_starts(tiny_model: Path, recipe_config: Callable[..., Any]) -> None:
    """The actor's worker probes its model once when it has loaded it, and not at all where no trees are asked for;
    GC2PO, which cannot go without packed rows, ends the run in one sentence."""
    config = recipe_config(f"actor_rollout_ref.model.path={tiny_model}", "device=cpu")
    *counts, refusal = run_on_ranks(1, loaded, config)[0]
    assert counts == [1, 1, 1]
    assert refusal.startswith("GC2PO perturbs states in packed rows, which this run can't have: of a reason; use ")
