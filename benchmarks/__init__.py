"""Op benchmarks: `python -m benchmarks [ops...] --device cpu|cuda [--json FILE] [--quick] [--dtype float32 ...]`.

Every case runs its providers side by side: `ours`, `eager` (plain torch as peers write it), `compile` (torch.compile
of the eager code, gradients through AOTAutograd), ours on the other backends that this machine has (`reference` is
the plain torch that specifies the op) and what is particular to an op. Rounds are interleaved (A, B, C, A, B, C, ...)
with a large copy in each, so that drift of the machine reaches all alike and the copy bandwidth is that of the same
seconds. Outputs are freed before the next call, and a sample starts with an untimed call, so that no provider pays for
the state in which another left the memory. On CUDA each call has its own events and finds a cold L2.

The JSON file:

    format    1
    machine   cpu, cores, threads, memory_gb, device, device_name, python, torch, triton, rlhf_kernels, commit,
              modified, date, argv, cpu_isa, backends {op: {device: backend}}, unavailable {backend: why}
    results   a list of cases:
      op, mode ("forward" under no_grad, or "forward+backward"), shape, dtype, backend (of ours)
      bytes_moved     compulsory traffic: every input read once and every result written once, and again what a backward
                      pass must read in its own time
      copy_gb_per_s   bytes read + written per second by copy_ of 256 MiB, median over the rounds of this case
      truth_rows      how many leading rows the error is measured on, null for all
      load_average    of the machine in the minute before the case ended: far above `threads`, other programs ran
                      and the times are not to be trusted
      failed          {provider: why} of the rivals that could not run here
      speedup         {provider: its median_s / median_s of ours}
      providers       {name: measurement}:
        what              one sentence
        samples_s         one a round: mean seconds of `calls` successive calls
        calls, median_s, iqr_s
        gb_per_s          bytes_moved / median_s / 1e9: of a rival that moves more, its useful part
        fraction_of_copy  gb_per_s / copy_gb_per_s; above 1 where the data fits in a cache
        peak_bytes        most memory that torch had allocated during a call, over its inputs; results included
        max_abs_error     {output: largest |difference| from the eager code in float64}

Timings are never tests: tests/test_benchmarks.py checks that the numbers are what this page says they are.
"""
