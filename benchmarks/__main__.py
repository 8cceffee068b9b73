"""Runs the benchmarks; see the package's docstring for what is measured and how it is stored."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

FORMAT = 2
OPS = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
KINDS = ("op", "trainer", "scaling", "all")
DTYPES = ("float32", "float64", "bfloat16", "float16")
PROVIDERS = (
    "ours", "products", "eager", "compile", "torch", "trl", "liger", "cce", "flash_attn", "verl", "reference", "triton",
    "fused_fp32",
)  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Ours beside eager, torch.compile and other projects: ops at fixed and growing sizes, the trainer.",
        epilog="Exit code 1: the battery of an op fails here, or an op is slower than in --compare OLD.json.",
        allow_abbrev=False,
    )
    what = f"op, scaling (over sizes), trainer, all of these, or names of ops: {', '.join(OPS)}; default op"
    parser.add_argument("what", nargs="*", metavar="what", help=what)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default float32; on cuda bfloat16 for what has logits or a head"
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default all that the op has here")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing a case (default 10)")
    parser.add_argument("--memory-gb", type=float, help="what a sweep may fill; default what is free")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="in Liger's columns")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="PNG files; needs matplotlib")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="is ours slower than in that file?")
    args = parser.parse_args(argv)
    if unknown := [word for word in args.what if word not in (*KINDS, *OPS)]:
        parser.error(f"what: expected some of {', '.join((*KINDS, *OPS))}, got {', '.join(unknown)}")
    named = [word for word in args.what if word in OPS]
    kinds = set(args.what) & set(KINDS)
    args.kinds = {"op", "trainer", "scaling"} if "all" in kinds else kinds or {"op"}
    args.ops = named or OPS
    if args.compare and not args.compare.is_file():
        parser.error(f"--compare: expected a file that --json wrote, got {args.compare}")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads; the profiler announces every run otherwise
    import torch

    from . import liger_csv, ops, report, scaling
    from .files import write_text

    device = torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device here; --device cpu runs everywhere", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    if not any(ops.dtypes(ops.bench(op), args.dtype, device) for op in args.ops):
        print(f"--dtype {' '.join(args.dtype)}: {' and '.join(args.ops)} take none of them", file=sys.stderr)
        return 2
    old = json.loads(args.compare.read_text()) if args.compare else None
    if old and old.get("format") != FORMAT:
        print(f"--compare {args.compare}: expected format {FORMAT}, got {old.get('format')}", file=sys.stderr)
        return 2
    facts = report.machine(device, argv)
    print(report.machine_line(facts), flush=True)
    outcome = ops.Outcome()
    found = {"format": FORMAT, "machine": facts, "refused": outcome.refused, "results": outcome.results, "scaling": []}

    def save() -> None:
        if args.json:
            write_text(args.json, report.text(found))

    if "op" in args.kinds:
        ops.run(args, old, facts, outcome, save)
    if "scaling" in args.kinds:
        scaling.run(args, found["scaling"], save)
    save()
    if args.csv:
        liger_csv.write(found, args.csv)
    if args.plots:
        from . import plots

        print("\n".join(f"wrote {path}" for path in plots.draw(found, args.plots)))
    code = 1 if outcome.refused or any(verdict.slower for verdict in outcome.verdicts) else 0
    if "trainer" in args.kinds:
        from . import trainer

        code = trainer.main(args) or code
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
