"""Runs the op benchmarks; see the package's docstring for what is measured and how it is stored."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from dataclasses import asdict
from pathlib import Path

FORMAT = 1
OPS = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
DTYPES = ("float32", "float64", "bfloat16", "float16")
PROVIDERS = ("ours", "products", "eager", "compile", "verl", "liger", "trl", "reference", "triton", "fused_fp32")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Op benchmarks: ours beside eager and torch.compile.",
        allow_abbrev=False,
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"all of {', '.join(OPS)} unless named")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32"], help="default float32; ops on logits take all"
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default all that the op has here")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing a case (default 10)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    unknown = [op for op in args.ops if op not in OPS]
    if unknown:
        parser.error(f"op: expected some of {', '.join(OPS)}, got {', '.join(unknown)}")
    args.ops = args.ops or OPS
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads; the profiler announces every run otherwise
    import torch

    from .files import write_json
    from .harness import measure
    from .report import machine, machine_line, table

    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device here; --device cpu runs everywhere", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    facts, results = machine(device, argv), []
    print(machine_line(facts), flush=True)
    for op in args.ops:
        bench = importlib.import_module(f".bench_{op}", __package__)
        for dtype in [name for name in args.dtype if name in bench.DTYPES]:
            for case in bench.cases(device, getattr(torch, dtype), args.quick):
                results.append(measure(case, device, 0.5 if args.quick else args.seconds, args.providers))
                print("\n" + table(results[-1]), flush=True)
                if args.json:  # after each: a run may be cut short
                    found = [asdict(result) for result in results]
                    write_json(args.json, {"format": FORMAT, "machine": facts, "results": found})
    if not results:
        print(f"--dtype {' '.join(args.dtype)}: {' and '.join(args.ops)} take none of them", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
