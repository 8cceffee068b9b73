"""`python -m benchmarks trainer --device cpu|cuda [--json FILE] [--plots DIR] [--quick]`: PPO and DPO steps by phase.

Ours beside TRL's at three vocabularies, the same work in both, checked (benchmarks/peers/ppo_step.py and dpo_step.py);
where `make peers` has not been run, ours alone. DPO asks the reference at every step, as TRL does by default, so that
it is a phase. On a GPU a PPO step of OPT-1.3B comes first, at the shape for which DeepSpeed published figures. Each
trainer runs in a process of its own; one untimed step comes first, and figures are medians of those that follow.

Phases of PPO: generation; scoring by policy, reference, value and reward model (TRL keeps the policy's logits from
generation); advantages; update, all epochs. Of DPO: reference; gradient, the forward and backward pass; optimizer.
`rest` is what remains of the step. Ours are the `timing/` metrics, TRL's its functions, timed from outside; its PPO
collects garbage in `advantages` and `rest`. On a GPU a phase ends when the device has done its work, and both wait.

The JSON file is written after every comparison:

    format    1
    machine   as in the op benchmarks' file, with command, transformers, and trl {ppo|dpo: {package: version}}
    results   a list of comparisons:
      trainer, name, settings     "ppo" or "dpo", and what both were given
      failed                      {"rlhf" or "trl": why}: without providers where ours failed
      trl_over_rlhf               {step_s, cpu_s, growth_bytes, peak_bytes: TRL's over ours}, empty where ours is alone
      published                   figures of others at this shape: source, what, generation_s, step_s; or absent
      providers                   {"rlhf", "trl": measurement}:
        seconds, cpu_seconds, phases   one a step, the first included; of the whole process, {phase: seconds}
        step_s, cpu_s, phases_s        medians without the first; the phases of the step with the median seconds
        built_bytes, peak_bytes, growth_bytes   held when the models were built, the most since, and their difference:
                                       resident memory of the process, on a GPU what torch had allocated
        load_average                   when it ended: far above the threads, other programs ran
        entropy, response_tokens, losses   by which the work was checked
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import dpo_step, ppo_step, steps

VOCABULARIES = (512, 32_000, 151_936)
TIMED_STEPS = 3
# A step at a larger vocabulary has fewer rows, so that all of them take minutes on two cores.
CPU_ROWS = {"ppo": (64, 32, 8), "dpo": (16, 8, 4)}
GPU_ROWS = {"ppo": (64, 64, 64), "dpo": (32, 32, 32)}
GPU_LLAMA = {"kind": "llama", "width": 1024, "layers": 8, "heads": 16}
GPU_SIZES = {"ppo": {"prompt_length": 128, "response_length": 128, "shortest": 128}, "dpo": {"longest": 1024}}
QUICK_LLAMA = {"kind": "llama", "width": 32, "layers": 2, "heads": 2}
QUICK_SIZES = {
    "ppo": {"prompts": 4, "prompt_length": 6, "response_length": 8, "shortest": 8, "epochs": 2},
    "dpo": {"pairs": 4, "longest": 24},
}
# OPT-1.3B and OPT-350M as their configurations on the hub have them.
OPT_1B = {"kind": "opt", "width": 2048, "layers": 24, "heads": 32}
OPT_350M = {"kind": "opt", "width": 1024, "layers": 24, "heads": 16}
OPT_1B |= {"max_position_embeddings": 2048}
OPT_350M |= {"max_position_embeddings": 2048, "word_embed_proj_dim": 512, "do_layer_norm_before": False}
OPT_SIZES = {"vocab": 50_272, "prompts": 8, "prompt_length": 256, "response_length": 128, "shortest": 128, "epochs": 1}
QUICK_OPT = {"kind": "opt", "width": 32, "layers": 2, "heads": 2}
PUBLISHED = {
    "source": "https://github.com/deepspeedai/DeepSpeed/pull/8271",
    "what": "HybridEngine on one H100, generation and one training step of the policy alone",
    "DeepSpeed, eager": {"generation_s": 0.6767, "step_s": 0.8128},
    "DeepSpeed, CUDA graphs": {"generation_s": 0.3608, "step_s": 0.5035},
}


@dataclass(frozen=True)
class Comparison:
    settings: dict
    check: steps.Check
    published: dict | None = None
    rivals: bool = True


def comparisons(device: str, threads: int, quick: bool) -> Iterator[Comparison]:
    """The most telling first: a run may be cut short."""
    common = {"device": device, "threads": threads}
    if device == "cuda" or quick:
        yield opt(common, quick)
    for number in reversed(range(len(VOCABULARIES))):
        vocab = 64 if quick else VOCABULARIES[number]
        for trainer, module, rows in (("ppo", ppo_step, "prompts"), ("dpo", dpo_step, "pairs")):
            given = common | {"name": f"vocabulary {vocab:,}", "vocab": vocab, rows: CPU_ROWS[trainer][number]}
            given |= {"precompute": False} if trainer == "dpo" else {}
            if device == "cuda":
                given |= {"policy": GPU_LLAMA, rows: GPU_ROWS[trainer][number], **GPU_SIZES[trainer]}
            if quick:
                given |= {"policy": QUICK_LLAMA, **QUICK_SIZES[trainer]}
            yield Comparison(module.settings_of(1 if quick else TIMED_STEPS, **given), module.check)
        if quick:
            return


def opt(common: dict, quick: bool) -> Comparison:
    """OPT-1.3B with value and reward models of OPT-350M's shape, random weights."""
    given = common | {"name": "OPT-1.3B", "policy": OPT_1B, "reward": OPT_350M, **OPT_SIZES}
    if quick:
        narrow = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
        given |= {"name": "OPT, tiny", "policy": QUICK_OPT, "reward": QUICK_OPT | narrow, "vocab": 64}
        given |= QUICK_SIZES["ppo"] | {"epochs": 1}
    settings = ppo_step.settings_of(1 if quick else TIMED_STEPS, **given)
    return Comparison(settings, ppo_step.check, None if quick else PUBLISHED, rivals=False)


def run(
    chosen: list[Comparison],
    rivals: bool,
    done: Callable[[list[dict]], None],  # with all records until then
) -> list[dict]:
    results = []
    for one in chosen:
        try:
            record = steps.compare(one.settings, one.check, rivals and one.rivals)
        except steps.StepError as error:  # the others are worth their time all the same
            why = str(error).strip().splitlines()[-1][:300]
            record = {"trainer": one.settings["trainer"], "name": one.settings["name"], "providers": {}}
            record |= {"failed": {"rlhf": why}, "trl_over_rlhf": {}}
        results.append(record | ({"published": one.published} if one.published else {}))
        done(results)
    return results


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of both (default 2)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--alone", action="store_true", help="without TRL")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="for trainer-DEVICE.png")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """`args` may lack `threads` and `alone`; `seconds` means nothing here, as steps are counted. Beside other `kinds`
    of benchmarks, which write the JSON file, this one's is named FILE-trainer."""
    threads, alone, kinds = (getattr(args, *known) for known in (("threads", 2), ("alone", False), ("kinds", ())))
    module = "benchmarks" if kinds else "benchmarks.trainer"
    facts = steps.machine(args.device, threads, shlex.join(["python", "-m", module, *sys.argv[1:]]))
    path = args.json
    if path and set(kinds) - {"trainer"}:
        path = path.with_stem(f"{path.stem}-trainer")
    missing = sorted({str(p.relative_to(steps.ROOT)) for p in steps.TRL_PYTHON.values() if not p.exists()})
    if missing and not alone:
        print(f"no {' and no '.join(missing)} (`make peers`): ours runs alone", flush=True)

    def done(results: list[dict]) -> None:
        record = results[-1]
        failure = f"{record['trainer'].upper()} step, {record['name']} failed: {record['failed'].get('rlhf')}"
        print("\n" + (steps.table(record) if record["providers"] else failure), flush=True)
        steps.write(path, facts, results)

    results = run(list(comparisons(args.device, threads, args.quick)), not alone, done)
    if args.plots:
        from benchmarks.trainer_plots import plot

        print(f"wrote {plot(results, facts, args.plots / f'trainer-{args.device}.png')}")
    return 0 if all(record["providers"] for record in results) else 1


if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:])))
