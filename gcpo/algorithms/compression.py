"""The gradient of a text with respect to the language-model head, without a backward pass (L2T)."""

from __future__ import annotations

import torch
from torch import Tensor

from gcpo.algorithms._checks import as_float, check_integer, check_shape

AT_ONCE = 256
"""Number of tokens whose distributions are held in floating point at a time."""


@torch.no_grad()
def head_gradient_square(states: Tensor, logits: Tensor, labels: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Computes |g_k|^2, with g_k the gradient of log pi of segment k with respect to the language-model head.

    With logits_t = W h_t, the gradient with respect to W of the sum over the tokens t of segment k of
    log softmax(logits_t)[y_t] is g_k = sum_t (onehot(y_t) - softmax(logits_t)) h_t^T. No backward pass is needed.

    Args:
        states: [T, d], h_t, the inputs of the head.
        logits: [T, V].
        labels: [T], integers, y_t.
        segment: [T], integers, the segment of each token; negative = none.
        segments: The number of segments.

    Returns:
        [segments], zeros for segments without tokens; float64 if an input is, else float32. No gradient.

    Raises:
        ValueError: Shapes that do not fit, labels or segments that are not integers.
    """
    sizes: dict[str, int] = {}
    check_shape("states", states, "T d", sizes)
    check_shape("logits", logits, "T V", sizes)
    for name, tensor in (("labels", labels), ("segment", segment)):
        check_shape(name, tensor, "T", sizes)
        check_integer(name, tensor)
    dtype = as_float(states[:0], logits[:0])[0].dtype

    def error(at: Tensor) -> Tensor:
        found = -logits[at].to(dtype).softmax(-1)
        found[torch.arange(len(at), device=at.device), labels[at]] += 1
        return found

    squares = torch.zeros(segments, dtype=dtype, device=logits.device)
    for k in range(segments):
        pieces = (segment == k).nonzero()[:, 0].split(AT_ONCE)
        if len(pieces) == 1:
            # Few tokens: products over pairs of tokens, without a matrix of the size of the head.
            delta, state = error(pieces[0]), states[pieces[0]].to(dtype)
            squares[k] = ((delta @ delta.T) * (state @ state.T)).sum().clamp(min=0)
        else:
            gradient = sum(error(piece).T @ states[piece].to(dtype) for piece in pieces)
            squares[k] = torch.as_tensor(gradient).square().sum()
    return squares
