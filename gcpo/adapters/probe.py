"""The probe of a loaded model through verl's engine: packed trees are compared with single sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.utils.device import get_torch_device

from gcpo.adapters.scoring import PackScorer
from gcpo.scoring.attention import recorded_attention
from gcpo.scoring.probe import LONGEST, probe_sequences, verdict
from gcpo.scoring.requests import Score, ScoreRequest


def probe_trees(engine: Any, vocabulary: int) -> str | None:
    """Return why the engine's model gives wrong results on packed trees, ``None`` if they are right.

    All ranks must call it together, and all return the same value: the reason of the first rank that has one.

    Args:
        engine: a ``GCPOFSDPEngine`` whose configuration allows trees.
        vocabulary: number of the model's token ids.
    """
    with _evaluating(engine):
        problem = _compare(engine, vocabulary)
    group = engine.get_data_parallel_group()
    problems: list[str | None] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(problems, problem, group=group)
    # The rollout server, which starts next, measures the free memory.
    get_torch_device().empty_cache()
    return next((entry for entry in problems if entry is not None), None)


def _compare(engine: Any, vocabulary: int) -> str | None:
    sequences = probe_sequences(vocabulary)
    requests = [ScoreRequest(ids[:1], ids[1:], log_probs=True, state_at=len(ids) - 1) for ids in sequences]
    common = {
        "settings": {"use_remove_padding": engine.use_remove_padding, "use_fused_kernels": False},
        "temperature": 1.0,
        "layer": -1,
    }
    total = sum(map(len, sequences))
    right = PackScorer(engine, **common, is_tree=False, max_tokens=LONGEST)(requests)
    with recorded_attention() as record:
        try:
            found = PackScorer(engine, **common, is_tree=True, max_tokens=total, min_shared=2)(requests)
        except (torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        except Exception as error:
            return f"a probe of the loaded model fails on a packed tree ({type(error).__name__}: {error})"
    if record.problems:
        return "; ".join(record.problems)
    if not record.dtypes:
        return "the loaded model does not call the attention function that it is given"
    return verdict(
        (_values(found, "log_probs"), _values(right, "log_probs")),
        (_values(found, "state"), _values(right, "state")),
        max(record.dtypes, key=lambda dtype: torch.finfo(dtype).eps),
    )


def _values(scores: list[Score], name: str) -> list[Any]:
    return [getattr(score, name) for score in scores]


@contextmanager
def _evaluating(engine: Any) -> Iterator[None]:
    """Set evaluation mode, even if the engine is in use; without it the parameters may be on another device."""
    if engine.mode is None:
        with engine.eval_mode():
            yield
        return
    training = engine.module.training
    engine.module.eval()
    try:
        yield
    finally:
        engine.module.train(training)
