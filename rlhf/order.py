"""In which order examples come: functions of the seed and a number, so that a run continues from one integer."""

from __future__ import annotations

import random
from functools import lru_cache


@lru_cache(maxsize=4)
def permutation(n: int, key: str) -> list[int]:
    order = list(range(n))
    random.Random(key).shuffle(order)
    return order


@lru_cache(maxsize=4)
def epoch_order(parts: tuple[tuple[int, int], ...], seed: int, epoch: int) -> list[int]:
    """Which example stands where. Of a dataset that an epoch takes in part, epochs take one part after the other of its
    own shuffled passes: every example comes before one comes again."""
    chosen, start = [], 0
    for number, (count, taken) in enumerate(parts):
        copies, rest = divmod(taken, count) if count else (0, 0)
        chosen += list(range(start, start + count)) * copies
        for i in range(epoch * rest, (epoch + 1) * rest):
            chosen.append(start + permutation(count, f"{seed}/{number}/{i // count}")[i % count])
        start += count
    return [chosen[i] for i in permutation(len(chosen), f"{seed}/{epoch}")]
