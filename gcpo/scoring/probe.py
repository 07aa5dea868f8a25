"""A probe of a loaded model: a small random tree of sequences, scored packed and one sequence at a time.

The rules of `gcpo.scoring.support` judge a model by its configuration and the keywords of its attention calls. The
probe judges it by its results, so it also finds a layer that no rule knows.

The probe finds tokens that influence other branches of the tree or earlier rows (recurrent layers, convolutions,
routing with a bounded capacity, positions counted along the row), masks and biases that the model itself makes
for fewer than ``LONGEST`` tokens, and attention that does not use our function.
The probe cannot find an effect that begins after more than ``LONGEST`` tokens, such as a window of 4,096 tokens that
the model neither states in its configuration nor passes to its attention function. A probe of that length would cost
as much as a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LONGEST = 132
"""Length of the probe's longest sequence in tokens."""

_BOUNDS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}
"""Largest relative difference by the dtype of the attention.

Float32 leaves about 1e-5. In bfloat16 every layer rounds to 1/256, and two layouts of one sequence differ by some
hundredths; a wrong layout differs by about 1."""


def probe_sequences(vocabulary: int, *, seed: int = 0) -> list[torch.Tensor]:
    """Return the sequences of one tree with branches at several depths, and one that shares nothing.

    Args:
        vocabulary: number of token ids.
        seed: seed of the tokens; the global random state is not changed.

    Returns:
        Token ids, int64, of 36 to ``LONGEST`` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    first, last = min(3, vocabulary - 1), min(vocabulary, 4096)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(first, last, (length,), generator=generator)

    root, left, right, inner = tokens(40), tokens(24), tokens(9), tokens(12)
    chains = (
        (root, left, inner, tokens(LONGEST - 76)),
        (root, left, inner, tokens(5)),
        (root, left, tokens(17)),
        (root, right, tokens(30)),
        (root, right, tokens(1)),
        (tokens(36),),
    )
    return [torch.cat(chain) for chain in chains]


def relative_difference(found: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Return the largest error of a sequence's values relative to the spread of all right values.

    The spread makes one bound fit models of every size: log-probabilities of a random model vary by tenths, those of a
    trained one by several units.

    Args:
        found: values [T] or [d] of every sequence.
        right: right values of the same shapes.

    Returns:
        The largest root mean square difference over the root mean square deviation; infinite if values are not
        finite.
    """
    values = torch.stack(list(right)) if right[0].shape == right[-1].shape else torch.cat(list(right))
    spread = (values - values.mean(0)).square().mean().sqrt().clamp(min=1e-12)
    worst = max(float((a - b).square().mean().sqrt() / spread) for a, b in zip(found, right, strict=True))
    finite = all(bool(x.isfinite().all()) for x in (*found, *right))
    return worst if finite else float("inf")


def verdict(
    log_probs: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    states: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    dtype: torch.dtype,
) -> str | None:
    """Return why packed trees are wrong for a model, ``None`` if they are right.

    Args:
        log_probs: log-probabilities [T] of every sequence, packed and one sequence at a time.
        states: states [d] of every sequence, likewise.
        dtype: dtype of the attention.
    """
    bound = _BOUNDS.get(dtype, _BOUNDS[torch.bfloat16])
    for what, (found, right) in (("log-probabilities", log_probs), ("hidden states", states)):
        difference = relative_difference(found, right)
        if not difference <= bound:
            largest = max(float((a - b).abs().max()) for a, b in zip(found, right, strict=True))
            return (
                f"in a probe of the loaded model the {what} of packed sequences differ by up to {largest:.2g} from "
                f"those of one sequence at a time ({difference:.2g} of their spread; the bound in {dtype} is {bound:g})"
            )
    return None
