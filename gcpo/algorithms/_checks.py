"""Executable checks of shapes and options, and other helpers that the functions of this package share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, spec: str, sizes: dict[str, int]) -> None:
    """Check a tensor against named axes and remember the sizes that it fixes.

    Args:
        name: The argument's name, for the message.
        tensor: The tensor.
        spec: Axis names separated by blanks, such as ``"n L M d"``.
        sizes: Sizes that earlier arguments fixed; new axis names are added.

    Raises:
        ValueError: Another rank, or another size on an axis that is fixed already.
    """
    axes = spec.split()
    shape = tuple(tensor.shape)
    wrong = [a for a, s in zip(axes, shape, strict=False) if sizes.get(a, s) != s]
    if len(axes) != len(shape) or wrong:
        expected = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in axes)
        raise ValueError(f"{name} has shape {list(shape)} where [{expected}] is expected.")
    sizes.update(zip(axes, shape, strict=True))


def check_option(name: str, value: str, known: Sequence[str]) -> None:
    """Raise a ValueError that lists the known values when ``value`` is not one of them."""
    if value not in known:
        listed = ", ".join(repr(k) for k in known)
        raise ValueError(f"{name} is {value!r} where one of {listed} is expected.")


def check_at_least(name: str, value: float, bound: float) -> None:
    """Raise a ValueError unless ``value >= bound`` (NaN is refused too)."""
    if not value >= bound:
        raise ValueError(f"{name} is {value} where a number of at least {bound} is expected.")


def check_integer(name: str, tensor: Tensor) -> None:
    """Raise a ValueError when a tensor of labels or indices is not of an integer type."""
    if tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{name} has dtype {tensor.dtype} where an integer type is expected.")


def as_float(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert tensors to the dtype of the computation: float64 if one of them is float64, else float32."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def as_mask(name: str, mask: Tensor | None, like: Tensor, spec: str, sizes: dict[str, int]) -> Tensor:
    """Return a boolean mask of the checked shape, all True when none is given.

    Args:
        name: The argument's name, for the message.
        mask: Bool, integer or float; non-zero is True. None: everything is valid.
        like: The tensor that the mask belongs to; its leading axes give the shape of the default.
        spec: The mask's axes, as for `check_shape`.
        sizes: As for `check_shape`.
    """
    if mask is None:
        return torch.ones(like.shape[: len(spec.split())], dtype=torch.bool, device=like.device)
    check_shape(name, mask, spec, sizes)
    return mask.to(torch.bool)


def or_one(x: Tensor) -> Tensor:
    """Return x with its zeros replaced by ones, for a division whose result should be zero there."""
    return torch.where(x == 0, 1, x)
