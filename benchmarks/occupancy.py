"""Theoretical occupancy of a kernel: the warps that fit on a multiprocessor over the warps that it can hold.

Limits and granularities are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability",
and of cuda_occupancy.h of the toolkit: registers are handed out to a warp in units of 256, from one of four partitions;
shared memory in units of 128 bytes, and the system takes 1 KB of it a block.
"""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS, REGISTER_UNIT, PARTITIONS = 65536, 256, 4
WARPS, BLOCKS = 64, 32
SHARED_UNIT, SHARED_OF_SYSTEM = 128, 1024
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


@dataclass(frozen=True)
class Occupancy:
    blocks: int  # resident on a multiprocessor
    warps: int
    limit: str  # what allows no more: registers, shared memory, blocks or warps

    @property
    def share(self) -> float:
        return self.warps / WARPS


def _ceil(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def occupancy(arch: str, threads: int, registers: int, shared: int) -> Occupancy:
    """`threads` a block, `registers` a thread, `shared` bytes a block."""
    warps = _ceil(threads, 32) // 32
    partition = REGISTERS // PARTITIONS // _ceil(max(registers, 1) * 32, REGISTER_UNIT)
    blocks = {
        "registers": partition * PARTITIONS // warps,
        "shared memory": SHARED[arch] // _ceil(shared + SHARED_OF_SYSTEM, SHARED_UNIT),
        "blocks": BLOCKS,
        "warps": WARPS // warps,
    }
    limit = min(blocks, key=blocks.get)
    return Occupancy(blocks[limit], blocks[limit] * warps, limit)
