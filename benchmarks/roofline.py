"""What bounds a pass through a loop: the memory of a machine, or one of the pipes of its multiprocessors."""

from __future__ import annotations

from dataclasses import dataclass

from .sass import Pass

# Lanes a clock of a multiprocessor: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", compute
# capability 9.0. `issue` is four warps a clock, `shared` the unit that serves shuffles and shared memory.
LANES = {"issue": 128, "alu": 64, "sfu": 16, "fp64": 64, "shared": 32}
LATENCY_NS = 600  # of a load under traffic: an assumption


@dataclass(frozen=True)
class Machine:
    name: str
    bytes_a_second: float
    multiprocessors: int
    clock: float  # Hz

    @property
    def bytes_a_clock(self) -> float:
        """Of a multiprocessor."""
        return self.bytes_a_second / self.multiprocessors / self.clock

    @property
    def instructions_a_byte(self) -> float:
        """That a thread may execute for each byte that it moves before issue takes longer than memory."""
        return LANES["issue"] / self.bytes_a_clock

    @property
    def bytes_in_flight(self) -> float:
        """That a multiprocessor must have asked for at any time to keep memory busy (Little's law)."""
        return self.bytes_a_second / self.multiprocessors * LATENCY_NS * 1e-9

    def __str__(self) -> str:
        rate, clock = self.bytes_a_second / 1e12, self.clock / 1e9
        return f"{self.name}: {rate:.1f} TB/s, {self.multiprocessors} multiprocessors at {clock:.1f} GHz"


MACHINE = Machine("H200", 4.8e12, 132, 1.8e9)


def limits(one: Pass) -> dict[str, float]:
    """Time of each pipe over the time of memory."""
    memory = max(one.bytes, 1) / MACHINE.bytes_a_clock
    used = {"issue": one.instructions, **one.pipes}
    return {pipe: used.get(pipe, 0) / lanes / memory for pipe, lanes in LANES.items()}


def verdict(fewest: Pass, most: Pass) -> str:
    """Of a pass by its fewest and by its most instructions."""
    found = []
    for one in (fewest, most):
        shares = limits(one)
        pipe = max(shares, key=shares.get)
        found.append("memory" if shares[pipe] <= 1 else f"{pipe}, {shares[pipe]:.2f} x memory")
    return found[0] if found[0] == found[1] else " to ".join(found)
