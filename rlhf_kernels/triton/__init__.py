"""Triton kernels: KERNELS maps an op's name to a launcher that takes the arguments of the op's schema."""

from collections.abc import Callable

KERNELS: dict[str, Callable] = {}
