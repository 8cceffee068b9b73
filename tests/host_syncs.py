"""Counts where the host waits for the device, on a machine that has none: a mode plays the device.

A tensor is on the device if it was sent there (`.to(device)`, which copies here so that the host keeps its own), was
made there (`device=`), is a model's weight, or was computed from such a tensor. Reading one of these on the host
counts.
"""

from __future__ import annotations

import traceback

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

READS = {
    Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.cpu,
    Tensor.numpy, Tensor.nonzero, torch.nonzero, Tensor.masked_select, torch.masked_select, torch.unique, Tensor.unique,
    Tensor.__contains__, torch.allclose, torch.equal, Tensor.equal,
}  # fmt: skip
SHAPES_BY_VALUE = {Tensor.repeat_interleave, torch.repeat_interleave, torch.where}


class CountSyncs(TorchFunctionMode):
    def __init__(self, *modules: torch.nn.Module):
        super().__init__()
        self.places: list[str] = []
        self._kept: dict[int, Tensor] = {}  # by id; keeping them keeps the ids unique
        for module in modules:
            self._put(*module.parameters(), *module.buffers())

    def _put(self, *found) -> None:
        self._kept |= {id(x): x for x in tree_leaves(found) if isinstance(x, Tensor)}

    def _on_device(self, *found) -> bool:
        return any(id(x) in self._kept for x in tree_leaves(found) if isinstance(x, Tensor))

    def _count(self) -> None:
        frames = [f for f in traceback.extract_stack() if "host_syncs" not in f.filename]
        self.places.append(" < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames[-4:])))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        sent = func is Tensor.to and any(isinstance(x, torch.device) for x in (*args, *kwargs.values()))
        if sent and not self._on_device(args[0]):
            moved = args[0].clone()
            self._put(moved)
            return moved
        there = self._on_device(args, kwargs)
        masked = func is Tensor.__getitem__ and any(
            isinstance(x, Tensor) and x.dtype == torch.bool and self._on_device(x) for x in tree_leaves(args[1:])
        )
        by_value = func in SHAPES_BY_VALUE and there and (len(args) + len(kwargs) < 3 or func is not torch.where)
        if (there and func in READS) or masked or by_value:
            self._count()
        out = func(*args, **kwargs)
        if func is Tensor.cpu:
            return out.clone()  # the host's own
        if there or kwargs.get("device") is not None:
            self._put(out)
        return out
