"""The probe's sequences and its verdict; the probe of an engine is in tests/adapters/test_probe.py."""

from __future__ import annotations

import pytest
import torch

from gcpo.scoring import PrefixForest
from gcpo.scoring.attention import recorded_attention, tree_attention
from gcpo.scoring.probe import LONGEST, probe_sequences, relative_difference, verdict


@pytest.mark.parametrize("vocabulary", [5, 320, 151_936])
def test_sequences(vocabulary: int) -> None:
    """A tree with forks at several depths, the same every time, without a trace in the global random state."""
    before = torch.get_rng_state()
    sequences = probe_sequences(vocabulary)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, sequences, probe_sequences(vocabulary)))
    assert max(map(len, sequences)) == LONGEST and min(map(len, sequences)) == 36
    assert all(0 <= int(s.min()) and int(s.max()) < vocabulary for s in sequences)
    forest = PrefixForest(sequences, min_shared=2)
    (pack,) = forest.packs()
    assert forest.tree_tokens < 0.7 * forest.dense_tokens
    assert max(map(len, pack.paths)) == 4 and pack.parents.count(-1) == 2


def values(noise: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    right = [3 * torch.randn(size, generator=generator) for size in (40, 60, 50)]
    found = [value.clone() for value in right]
    found[1] += 3 * noise * torch.randn(60, generator=generator)
    return found, right


@pytest.mark.parametrize(
    ("dtype", "passes", "fails"),
    [(torch.float32, 2e-4, 5e-3), (torch.float16, 0.01, 0.1), (torch.bfloat16, 0.1, 0.4)],
)
def test_bounds(dtype: torch.dtype, passes: float, fails: float) -> None:
    """Rounding passes and a wrong sequence among right ones does not, by the type; the sentence has both numbers."""
    good = values(0.0)
    assert verdict(good, good, dtype) is None
    assert verdict(values(passes), good, dtype) is None
    problem = verdict(values(fails), good, dtype)
    found, right = values(fails)
    assert (
        f"the log-probabilities of packed sequences differ by up to {(found[1] - right[1]).abs().max():.2g}" in problem
    )
    assert f"{relative_difference(found, right):.2g} of their spread; the bound in {dtype}" in problem
    assert "hidden states" in verdict(good, values(fails), dtype)


def test_values_that_are_not_finite() -> None:
    """NaN is no agreement."""
    found, right = values(0.0)
    found[2][3] = float("nan")
    assert relative_difference(found, right) == float("inf")
    assert verdict((found, right), values(0.0), torch.float32) is not None


def test_recording() -> None:
    """Inside, calls that would be refused go through and are noted down once, with the type; outside they raise."""
    (pack,) = PrefixForest([torch.tensor([1, 2, 3])]).packs()
    rows = torch.zeros(1, 2, 3, 8)
    with recorded_attention() as record:
        for _ in range(2):
            out, _ = tree_attention(torch.nn.Identity(), rows, rows, rows, None, tree_pack=pack, sliding_window=4)
            assert out.shape == (1, 3, 2, 8)
            tree_attention(torch.nn.Identity(), rows, rows, rows, None)
    assert record.dtypes == {torch.float32} and len(record.problems) == 2
    assert "sliding_window=4" in record.problems[0] and "not given the keywords" in record.problems[1]
    for keywords in ({"tree_pack": pack, "sliding_window": 4}, {}):
        with pytest.raises(ValueError, match="one at a time"):
            tree_attention(torch.nn.Identity(), rows, rows, rows, None, **keywords)
