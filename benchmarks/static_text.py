"""The words of benchmarks/results/static.md, and the predictions in it: arithmetic alone."""

from __future__ import annotations

from .roofline import LATENCY_NS, MACHINE

COPY = 4.3e12  # bytes a second, read and written: assumed of an H200
PRODUCTS = 790e12  # FLOP a second of bfloat16 matrix products: assumed of an H200

TEXT = f"""# What the machine code says

Written by `python -m benchmarks.static`; no GPU has run. Compiled by [[tools]].

Nothing below is a measurement. A kernel is compiled as its launcher launches it (types, alignment and constants
recorded from real calls) for sm_80, sm_90 and sm_100; what is read from a disassembly is that of sm_90. The CUDA
kernels are their float32 instances, `Pass` 0, 1 and 2 of `advantages_kernel` are SHAPE, MAPS and SCAN.

## Launches of a call

Triton's are recorded from its launchers, CUDA's counted in the emulator of the tests, which runs the wrappers with
the 132 multiprocessors of an H200. The number hangs on options, on whether there are few long sequences, and for
`adamw_bf16_` on the size modulo 16; on nothing else. The backward of `ppo_loss` is a multiplication by torch for each
gradient that the forward stored. Where both serve an op, CUDA does.

[[launches]]

## Resources

Registers a thread, spilled bytes (all three architectures), static and dynamic shared memory a block, and the warps
that fit on a multiprocessor over the 64 that it holds ([benchmarks/occupancy.py](../occupancy.py) cites the limits),
for sm_80 / sm_90 / sm_100. "64-bit offsets": no product of a program's index along the first axis is formed in 32
bits; the CUDA sources index by int64_t throughout. Occupancy alone is no aim: what memory needs is the last table's
"in flight".

[[resources]]

## A pass through the loop

Of the paths through an iteration with the most 16-byte accesses, the one of the fewest instructions and the one of
the most: the first is the usual one of `token_logprobs` and `logits_kl` (the second rescales the sums, which only a
block with a new maximum does), the second that of `ppo_loss` and `ppo_advantages` in CUDA (the first skips tokens
that do not count). A kernel without a loop is read whole. Columns: accesses of global memory (number x bytes) a
thread; instructions, and the same over the bytes; branches, barriers and accesses of local memory; then the time of
each pipe of a multiprocessor over the time that memory takes for the same bytes ({MACHINE}; lanes a clock in
[benchmarks/roofline.py](../roofline.py)). Issue takes longer than memory above {MACHINE.instructions_a_byte:.1f}
instructions a byte. "In flight" are the loads of one iteration of all threads that fit on a multiprocessor: at a
latency of {LATENCY_NS} ns, an assumption, memory is kept busy by {MACHINE.bytes_in_flight / 1024:.0f} KB.

[[loops]]

## The whole kernel

Instructions that can be reached from the entry; FP64 stands for options that reach a kernel as float64, sums of
statistics, and the powers of `adamw_bf16_`.

[[whole]]

## Predictions for an H200

Arithmetic, not measurement: bytes at {COPY / 1e12:.1f} TB/s and products at {PRODUCTS / 1e12:.0f} TFLOP/s, which
are assumptions.

[[predictions]]
"""


def predictions() -> list[list[str]]:
    """(op, floor, why) for the sizes that the project aims at."""
    rows, vocab, hidden = 8192, 128256, 4096
    logits = 2.0 * rows * vocab  # bytes in bfloat16
    flop = 2.0 * rows * hidden * vocab  # of one product
    gae, loss = 512 * 2048, 1_000_000
    milliseconds = lambda size: f"{size / COPY * 1e3:.2f} ms"  # noqa: E731
    microseconds = lambda size: f"{size / COPY * 1e6:.1f} us"  # noqa: E731
    return [
        [
            "`token_logprobs` forward, [8192 x 128256] bf16",
            milliseconds(logits),
            "one read of the logits; the loop issues in less time than that read takes, and asks for enough at once",
        ],
        [
            "the same, forward and backward",
            milliseconds(3 * logits),
            "two reads and one write; the backward's loop issues for nine tenths of that time",
        ],
        [
            "`linear_ppo_loss`, 8192 x 4096 x 128256 bf16",
            f"{3 * flop / PRODUCTS * 1e3:.1f} ms",
            f"three products of {flop / 1e12:.2f} TFLOP; its logits, written once and read four times by kernels and "
            f"products, are {milliseconds(5 * logits)} more where the L2 cache holds none of a chunk",
        ],
        [
            "`gae`, 512 x 2048 fp32, with a mask (CUDA)",
            microseconds(17 * gae),
            "rewards, values and mask in, advantages and returns out; one launch, whose 512 blocks are all resident "
            "at 4 a multiprocessor; a launch itself takes 2 us or more",
        ],
        [
            "`ppo_loss`, 1,000,000 tokens fp32, policy and value (CUDA)",
            microseconds(33 * loss),
            "six inputs and a mask in, two gradients out; the mask is read once more by the count before it",
        ],
    ]
