"""Host-side planners: which sequences share a packed row, and which share a micro-batch. In C++ where _host was
built, else as written here."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

try:
    from . import _host
except ImportError:  # an install without a compiler
    _host = None


def _longest_first(lengths: Sequence[int], limit: int, limit_name: str) -> list[int]:
    for i, n in enumerate(lengths):
        if not 0 <= n <= limit:
            way_out = f"truncate or drop that sequence, or raise {limit_name}"
            raise ValueError(
                f"lengths: expected every length in [0, {limit_name}={limit}], got {n} at index {i}; {way_out}"
            )
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def pack_sequences_reference(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, bin), sorted
    for i in _longest_first(lengths, capacity, "capacity"):
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            left, chosen = capacity, len(bins)
            bins.append([])
        else:
            left, chosen = room.pop(at)
        bins[chosen].append(i)
        insort(room, (left - lengths[i], chosen))
    return bins


def plan_microbatches_reference(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    longest = 0
    for i in _longest_first(lengths, token_budget, "token_budget"):
        if not batches or (len(batches[-1]) + 1) * longest > token_budget:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return batches


def pack_sequences(
    lengths: Sequence[int],  # tokens a sequence
    capacity: int,  # tokens a packed row
) -> list[list[int]]:
    """Indices of the sequences of each packed row: best fit decreasing, at most 11/9 of the fewest rows plus one;
    ties go to the lower index.

    Raises ValueError for a length that is negative or above capacity, naming its index.
    """
    return _host.pack_sequences(list(lengths), capacity) if _host else pack_sequences_reference(lengths, capacity)


def plan_microbatches(
    lengths: Sequence[int],  # tokens a sequence
    token_budget: int,  # most padded tokens (sequences x longest) a micro-batch may hold
) -> list[list[int]]:
    """Indices of the sequences of each padded micro-batch, longest first, so that the largest allocation comes first
    and padding is small.

    Raises ValueError for a length that is negative or above token_budget, naming its index.
    """
    return (
        _host.plan_microbatches(list(lengths), token_budget)
        if _host
        else plan_microbatches_reference(lengths, token_budget)
    )
