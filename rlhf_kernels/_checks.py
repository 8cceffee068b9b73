"""Checks that every op shares. A message names the argument, what was expected, what came, and the way out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _kind(value: object) -> str:
    return type(value).__name__


def is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_kind(value)}")


def is_float(name: str, value: Tensor) -> None:
    is_tensor(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}; convert it with .float()"
        )


def same_shape(name: str, value: Tensor, other_name: str, shape: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected the shape {tuple(shape)} of {other_name}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected device {other.device}, that of {other_name}, got {value.device}; "
            f"move it with .to({other_name}.device)"
        )


def like(name: str, value: Tensor | None, other_name: str, other: Tensor) -> None:
    """A float tensor of the same shape and device as `other`; None passes."""
    if value is not None:
        is_float(name, value)
        same_shape(name, value, other_name, other.shape)
        same_device(name, value, other_name, other)


def mask_like(mask: Tensor | None, other_name: str, other: Tensor) -> None:
    if mask is None:
        return
    is_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, True on tokens that count, got {mask.dtype}; convert it with .bool()")
    same_shape("mask", mask, other_name, other.shape)
    same_device("mask", mask, other_name, other)


def token_layout(name: str, value: Tensor, cu_seqlens: Tensor | None) -> int:
    """Checks the padded (B, T) or packed (N,) layout and returns the number of sequences."""
    if cu_seqlens is None:
        if value.dim() != 2:
            raise ValueError(f"{name}: expected (B, T), got {tuple(value.shape)}; packed (N,) tokens need cu_seqlens")
        return value.shape[0]
    is_tensor("cu_seqlens", cu_seqlens)
    if value.dim() != 1:
        raise ValueError(f"{name}: expected packed (N,) because cu_seqlens is given, got {tuple(value.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected (B+1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected int32, got {cu_seqlens.dtype}; convert it with .int()")
    same_device("cu_seqlens", cu_seqlens, name, value)
    return cu_seqlens.shape[0] - 1


def options(value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"options: expected {kind.__name__}(...), got {_kind(value)}")


def one_of(name: str, value: str, options: Sequence[str]) -> int:
    """The index of an option, the code that a schema carries."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(options)}, got {value!r}")
    return options.index(value)


def number(
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """A finite real number, optionally in [low, high], strictly above a bound or strictly below one."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or value != value
        or value in (float("inf"), -float("inf"))
    ):
        raise ValueError(f"{name}: expected a finite int or float, got {value!r}")
    if above is not None and value <= above:
        raise ValueError(f"{name}: expected a number above {above}, got {value}")
    if below is not None and value >= below:
        raise ValueError(f"{name}: expected a number below {below}, got {value}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"in [{'-inf' if low is None else low}, {high}]"
        raise ValueError(f"{name}: expected a number {bounds}, got {value}")


def scalar(
    name: str, value: float | Tensor | None, other_name: str, other: Tensor, *, above: float | None = None
) -> None:
    """None, a number (above a bound) or a 0-dim tensor beside another one, whose value is not looked at."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: expected a number or a 0-dim tensor, got shape {tuple(value.shape)}")
        same_device(name, value, other_name, other)
    elif value is not None:
        number(name, value, above=above)
