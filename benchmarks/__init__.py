"""Benchmarks: `python -m benchmarks [op|scaling|trainer|all] [names of ops]`, `--help` for the rest.

`op` (the default) runs every op at fixed sizes, `scaling` some over growing sizes (scaling.py), `trainer` whole steps
(trainer.py). Each op first goes through the small cases of its battery here, on every backend that would be timed; if
one fails, the op is refused, no figure of it is reported, and the exit code is 1.

Every case runs its providers side by side: `ours`, `eager` (plain torch as peers write it), `compile` (torch.compile
of the eager code, gradients through AOTAutograd), `torch`, `trl`, `liger`, `cce` (cut-cross-entropy), `flash_attn` and
`verl` where these libraries compute the same and are installed (`make peers`), ours on the other backends that this
machine has (`reference` is the plain torch that specifies the op) and what is particular to an op. Rounds are
interleaved (A, B, C, A, B, C, ...) with a large copy in each, and a large matrix product where the op has products, so
that drift of the machine reaches all alike and the ceilings are those of the same seconds. Outputs are freed before the
next call, and a sample starts with an untimed call, so that no provider pays for the state in which another left the
memory. On CUDA each call has its own events and finds a cold L2.

The JSON file:

    format    2
    machine   cpu, cores, threads, memory_gb, device, device_name, python, torch, triton, peers {package: version},
              rlhf_kernels, commit, modified, date, argv, cpu_isa, backends {op: {device: backend}},
              unavailable {backend: why}
    refused   {op: the first failure of its battery}, and {case: what ours raised there}
    results   a list of cases:
      op, variant (what it computes here, "" where there is one), mode ("forward" under no_grad, or
      "forward+backward"), sizes {name: number}, shape (the numbers), dtype, backend (of ours), input_bytes
      bytes_moved     compulsory traffic: every input read once and every result written once, and again what a backward
                      pass must read in its own time
      flops           of the matrix products that the results need, none twice; 0 for ops without
      copy_gb_per_s   bytes read + written per second by copy_ of 256 MiB, median over the rounds of this case
      matmul_tflop_per_s  of a square product in the op's dtype (1,536 on a CPU, 8,192 on CUDA), or null
      truth_rows      how many leading rows the error is measured on, null for all
      load_average    of the machine in the minute before the case ended: far above `threads`, other programs ran
                      and the times are not to be trusted
      failed          {provider: why} of the rivals that could not run here, those not installed among them
      speedup         {provider: its median_s / median_s of ours}
      providers       {name: measurement}:
        what              one sentence
        samples_s         one a round: mean seconds of `calls` successive calls
        calls, p20_s, median_s, p80_s
        gb_per_s          bytes_moved / median_s / 1e9: of a rival that moves more, its useful part
        fraction_of_copy  gb_per_s / copy_gb_per_s; above 1 where the data fits in a cache
        tflop_per_s, fraction_of_matmul   the same of flops, or null. A provider that multiplies again for memory does
                          more; on a CPU ours widens 16 bits and may pass the product in 16 bits
        peak_bytes        most memory that torch had allocated during a call, over its inputs; results included
        ops               operators that the dispatcher ran, those inside others too. On a CPU this stands in for
                          launches; compiled code calls few and is not dispatched
        launches          kernels launched, on CUDA, else null
        host_syncs        on CUDA how often the host waited for a stream; on a CPU, where nothing waits, the operators
                          that read a value (item, nonzero, masked_select, unique), argument checks among them
        max_abs_error     {output: largest |difference| from the eager code in float64}
    scaling   a list of sweeps: op, variant, mode, dtype, x_name (the size that varies), stopped {provider: why},
              points (a list of cases as above, without errors; `failed` says at which need of memory or time a
              provider stopped; ours stops for memory alone)

`--csv` writes the same in Liger's columns (liger_csv.py), `--plots` draws it (plots.py), `--compare OLD.json` says
which op became slower (compare.py). Timings are never tests: `make bench-check` (regressions.py) is apart from `make
test`, and tests/test_benchmarks.py checks that the numbers are what this page says they are.
"""
