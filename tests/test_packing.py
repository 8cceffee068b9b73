"""pack_sequences and plan_microbatches: C++ against the Python specification, and what they promise."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kernels import pack_sequences, plan_microbatches
from rlhf_kernels.packing import pack_sequences_reference, plan_microbatches_reference

LENGTHS = st.lists(st.integers(0, 100), max_size=60)


@given(LENGTHS)
@settings(max_examples=200, deadline=None)
def test_rows_hold_every_sequence_once_and_fit(lengths):
    rows = pack_sequences(lengths, 100)
    assert rows == pack_sequences_reference(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    # Best fit decreasing never leaves two rows that could be one.
    loads = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > 100


@given(LENGTHS, st.integers(100, 1000))
@settings(max_examples=200, deadline=None)
def test_microbatches_hold_every_sequence_once_and_fit(lengths, budget):
    batches = plan_microbatches(lengths, budget)
    assert batches == plan_microbatches_reference(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)


def test_packing_saves_rows():
    assert len(pack_sequences([60, 50, 40, 50], 100)) == 2
    assert plan_microbatches([1, 9, 2, 8], 18) == [[1, 3], [2, 0]]


@pytest.mark.parametrize(
    "planner", [pack_sequences, plan_microbatches, pack_sequences_reference, plan_microbatches_reference]
)
def test_bad_lengths(planner):
    with pytest.raises(
        ValueError, match=r"lengths: expected every length in \[0, \w+=10\], got 11 at index 1; truncate or drop"
    ):
        planner([3, 11], 10)
    with pytest.raises(ValueError, match="got -1 at index 0"):
        planner([-1], 10)
