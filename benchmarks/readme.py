"""`python -m benchmarks.readme [--check]`: the performance section of README.md, from the files in benchmarks/results.

Rewrites what stands between the markers; --check changes nothing and exits with status 1 where that is out of date.
Figures of an op, of a trainer's step and of the layouts are those of the newest file that has them on a kind of device;
a file is known by what it holds, and one that holds nothing shown here is named on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .readme_files import (
    Results,
    Table,
    digits,
    markdown,
    megabytes,
    milliseconds,
    newest,
    read,
    seconds,
    source,
)

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
RIVALS = {
    "eager": "eager",
    "compile": "torch.compile",
    "torch": "torch",
    "trl": "TRL",
    "liger": "Liger",
    "cce": "CCE",
    "flash_attn": "flash-attn",
    "verl": "verl",
}
PRODUCTS = "products"  # the bare matrix products that an op needs: a floor, not a rival
PEERS = {"trl": "trl", "liger": "liger_kernel", "cce": "cut-cross-entropy", "flash_attn": "flash-attn", "verl": "verl"}
PENDING = """\
No GPU results yet: figures for GPUs are pending. The Triton and CUDA kernels are checked in the interpreter, in an
emulator and by ahead-of-time compilation for sm_80, sm_90, sm_100 and gfx942; `make gpu RESULTS_DIR=dir` tests and
times them on a machine that has one."""


# Ops


def sizes_of(result: dict) -> str:
    sizes = result.get("sizes") or result["shape"]
    return " x ".join(f"{size:,}" for size in (sizes.values() if isinstance(sizes, dict) else sizes))


def label(result: dict) -> str:
    variant = f" {result['variant']}" if result.get("variant") else ""
    dtype = "" if result["dtype"] == "float32" else f", {result['dtype']}"
    return f"`{result['op']}`{variant} {result['mode'].replace('+', ' + ')}{dtype}"


def ratio(result: dict, name: str) -> float | None:
    """A rival's median over ours."""
    rows = result["providers"]
    return rows[name]["median_s"] / rows["ours"]["median_s"] if {name, "ours"} <= rows.keys() else None


def largest(results: list[dict]) -> list[dict]:
    """Of each op, variant, mode and type the case that moves the most bytes."""
    found: dict[str, dict] = {}
    for result in results:
        if "ours" in result["providers"]:
            found[label(result)] = max(found.get(label(result), result), result, key=lambda r: r["bytes_moved"])
    return sorted(found.values(), key=label)


def heads_of(names: list[str], machine: dict) -> list[str]:
    versions = machine.get("peers", {})
    return [f"{RIVALS.get(n, n)} {versions.get(PEERS.get(n), '')}".strip() for n in names]


def op_table(results: list[dict], machine: dict) -> Table:
    names = [n for n in (*RIVALS, PRODUCTS) if any(ratio(result, n) is not None for result in results)]
    with_eager = any("eager" in result["providers"] for result in results)
    of_both = ["peak, MB: ours, eager", "largest error: ours, eager"] if with_eager else ["peak, MB", "largest error"]
    rows = [["op", "size", "ours, ms", *heads_of(names, machine), *of_both]]
    for result in results:
        both = [result["providers"][name] for name in ("ours", "eager") if name in result["providers"]]
        ratios = [ratio(result, name) for name in names]
        errors = (f"{max(row['max_abs_error'].values(), default=0.0):.0e}" for row in both)
        cells = [milliseconds(both[0]["median_s"]), *("" if r is None else f"{digits(r)}x" for r in ratios)]
        cells += [", ".join(megabytes(row["peak_bytes"]) for row in both), ", ".join(errors)]
        rows.append([label(result), sizes_of(result), *cells])
    return rows


def slower(results: list[dict]) -> str:
    """Every case of the files in which a rival takes less time, shown in the table or not."""
    found = []
    for result in results:
        faster = [(name, ratio(result, name)) for name in result["providers"] if name not in ("ours", PRODUCTS)]
        told = [f"{RIVALS.get(name, name)} {digits(r)}x" for name, r in faster if r is not None and r < 1]
        found += [f"{label(result)} at {sizes_of(result)}: {', '.join(told)}"] if told else []
    return (
        f"Where another is faster: {'; '.join(found)}." if found else "No other is faster in any case of these files."
    )


def ops(files: list[Results], device: str) -> Iterator[str]:
    everything = []
    for file, results in newest(files, "op", device, lambda result: result["op"] if device == "cpu" else _with(result)):
        shown = largest(results)
        if shown:
            yield source(file, results)
            yield markdown(op_table(shown, file.machine))
            yield from (f"Not timed, for it failed there: `{op}`, {why}" for op, why in file.refused.items())
            everything += results
    if everything:
        yield slower(everything)


def _with(result: dict) -> tuple[str, bool]:
    """`make gpu` times an op twice: with everybody but torch.compile, then beside that, as far as time allows."""
    return result["op"], "compile" in result["providers"] or "compile" in result.get("failed", {})


def scaling(files: list[Results], device: str) -> Iterator[str]:
    files = [replace(file, results=[r for r in file.results if _reached(r, "ours")]) for file in files]
    for file, results in newest(files, "scaling", device, lambda result: (label(result), result["x_name"])):
        yield source(file, results)
        yield markdown(scaling_table(results, file.machine))


def _reached(result: dict, name: str) -> list[dict]:
    """The points of a curve that a provider ran."""
    return [point for point in result.get("points", []) if name in point["providers"]]


def scaling_table(results: list[dict], machine: dict) -> Table:
    """Of each curve the last point of ours, and where those stopped who did not come so far."""
    names = [n for n in RIVALS if any(_reached(r, n) for r in results)]
    rows = [["op", "against", "fixed", "ours: ms, MB", *heads_of(names, machine)]]
    for r in results:
        last, x_name = _reached(r, "ours")[-1], r["x_name"]
        cells = []
        for name in ("ours", *names):
            own, why, points = last["providers"].get(name), r["stopped"].get(name), _reached(r, name)
            if own:
                time = milliseconds(own["median_s"]) if name == "ours" else f"{digits(ratio(last, name))}x"
                cells.append(f"{time}, {megabytes(own['peak_bytes'])}" + (f"; ends there: {why}" if why else ""))
            else:
                end = f"ends at {points[-1]['sizes'][x_name]:,}: " if points else ""
                cells.append(f"{end}{why}" if why else "")
        fixed = [f"{k} {v:,}" for k, v in last["sizes"].items() if k != x_name]
        rows.append([label(r), f"{x_name}, to {last['sizes'][x_name]:,}", ", ".join(fixed), *cells])
    return rows


# Trainers, layouts, rankings


def trainers(files: list[Results], device: str) -> Iterator[str]:
    """One table of all files, which hold a step each or all of them."""
    rows, sources, published = [], [], []
    for file, results in newest(files, "trainer", device, lambda result: (result["trainer"], result["name"])):
        measured = [result for result in results if result["providers"]]
        rows += [(file, result) for result in measured]
        sources += [source(file, measured) + _trl(file.machine, measured)] if measured else []
        published += [_published(result) for result in measured if result.get("published")]
    if rows:
        yield markdown(trainer_table(rows))
        yield from ("\n".join(f"- {line}" for line in sources), *published)


def _trl(machine: dict, results: list[dict]) -> str:
    beside = {result["trainer"] for result in results if "trl" in result["providers"]}
    versions = sorted(f"{machine['trl'][kind]['trl']} for {kind.upper()}" for kind in beside)
    return f" TRL {', '.join(versions)}." if versions else ""


def _published(result: dict) -> str:
    rows = [(name, row) for name, row in result["published"].items() if isinstance(row, dict)]
    told = (f"{name} {milliseconds(r['generation_s'])} and {milliseconds(r['step_s'])} ms" for name, r in rows)
    link = f"[{result['published']['what']}]({result['published']['source']})"
    return f"Published for {result['name']} at this shape, generation and the whole ({link}): {'; '.join(told)}."


def trainer_table(rows: list[tuple[Results, dict]]) -> Table:
    memory = "memory above the models, GB: ours, TRL"
    table = [["step", "work", "ours, s", "TRL, s", "", memory, "seconds by phase: ours (TRL)"]]
    for file, result in sorted(rows, key=lambda row: (row[1]["trainer"] != "ppo", row[1]["settings"]["vocab"])):
        ours, *others = result["providers"].values()
        name = f"[{result['trainer'].upper()}, {result['name']}](benchmarks/results/{file.path.name})"
        cells = [name, work(result["settings"]), seconds(ours["step_s"]), "", "", f"{ours['growth_bytes'] / 1e9:.2f}"]
        for theirs in others:
            cells[3:5] = seconds(theirs["step_s"]), f"{digits(theirs['step_s'] / ours['step_s'])}x"
            cells[5] += f", {theirs['growth_bytes'] / 1e9:.2f}"
        phases = []
        for phase, spent in ours.get("phases_s", {}).items():
            beside = "".join(f" ({seconds(theirs['phases_s'].get(phase, 0.0))})" for theirs in others)
            phases.append(f"{phase} {seconds(spent)}{beside}")
        table.append([*cells, ", ".join(phases)])
    used = [any(column) for column in zip(*table[1:])]
    return [[cell for cell, shown in zip(row, used) if shown] for row in table]


def work(settings: dict) -> str:
    model = "{kind} of width {width}, {layers} layers".format(**settings["policy"]).replace("llama", "Llama")
    if settings["trainer"] == "dpo":
        return f"{settings['pairs']} pairs of {settings['shortest']} to {settings['longest']:,} tokens; {model}"
    if settings["trainer"] == "grpo":
        return "{completions} completions, {prompt_length} + {response_length} tokens; ".format(**settings) + model
    epochs = "1 epoch" if settings["epochs"] == 1 else f"{settings['epochs']} epochs"
    new = "{shortest} to {response_length}".format(**settings).removeprefix(f"{settings['response_length']} to ")
    return f"{settings['prompts']} prompts of {settings['prompt_length']} tokens, {new} new; {epochs}; {model}"


def layouts(files: list[Results]) -> Iterator[str]:
    for file, results in newest(files, "layout", "cpu", lambda result: "layouts"):
        rows = [["`memory_layout`", "score, mean ± standard error", "by seed", "peak, MB", "`--dry_run` said"]]
        for r in results:
            seeds, error = " ".join(f"{score:.3f}" for score in r["scores"]), r["standard_error"]
            score = f"{r['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")
            sizes = [megabytes(r["peak_bytes"]), megabytes(r["estimated_bytes"])]
            rows.append([f"`{r['layout'].replace(' + ', ' ')}`", score, seeds, *sizes])
        yield source(file, results)
        yield markdown(rows)
        return


def rankings(files: list[Results]) -> Iterator[str]:
    for file, results in newest(files, "ranking", "cpu", lambda result: "rankings"):
        rows = [["data", "accuracy", "against pairs", "responses judged", "s a run"]]
        for r in results:
            gain = f"{r['gain']:+.3f} ± {r['gain_standard_error']:.3f}" if r["gain"] else ""
            accuracy = f"{r['mean']:.3f} ± {r['standard_error']:.3f}"
            rows.append([r["way"], accuracy, gain, f"{r['responses']:,}", f"{r['seconds']:.1f}"])
        yield source(file, results)
        yield markdown(rows)
        return


# The section


def checks(folder: Path) -> Iterator[str]:
    """What `make gpu` found wrong and right, on each GPU the last time."""
    last: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        tests = [report[name] for name in ("tests", "large_tests") if report.get(name)] if "steps" in report else []
        if not tests or report["device"] != "cuda":
            continue
        counts = [f"{sum(part[outcome] for part in tests)} {outcome}" for outcome in ("passed", "failed", "skipped")]
        counts += ["not all ran"] * any(part.get("killed") for part in tests)
        memcheck = (report.get("sanitizer") or {}).get("summary")
        told = f"{report['driver']}: tests {', '.join(counts)}" + (f"; memcheck: {memcheck}" if memcheck else "")
        name = str(report["driver"]).partition(",")[0]
        last[name] = max(last.get(name, ("", "")), (path.stem, f"{told} ([file](benchmarks/results/{path.name}))."))
    yield from (told for _, told in last.values())


def section(folder: Path) -> str:
    files = read(folder)
    on_gpu = [*ops(files, "cuda"), *scaling(files, "cuda"), *trainers(files, "cuda")]
    parts = [
        ("Ops", OPS_INTRODUCTION, [*ops(files, "cpu")]),
        ("Over growing sizes", SCALING_INTRODUCTION, [*scaling(files, "cpu")]),
        ("Steps of the trainers", TRAINERS_INTRODUCTION, [*trainers(files, "cpu")]),
        ("Memory layouts", LAYOUTS_INTRODUCTION, [*layouts(files)]),
        ("Rankings against pairs", RANKINGS_INTRODUCTION, [*rankings(files)]),
        ("On a GPU", "", [*checks(folder), *(on_gpu or [PENDING])]),
    ]
    for (_, _, found), name, what in (
        (parts[1], "scaling-linear_ppo_loss.png", "Time and memory against tokens and vocabulary"),
        (parts[2], "trainer-cpu.png", "Seconds of a step by phase"),
    ):
        if found and (ROOT / "docs" / name).exists():
            found.append(f"![{what}](docs/{name})")
    blocks = [[f"### {title}", *filter(None, [introduction]), *found] for title, introduction, found in parts if found]
    return "\n\n".join(["\n\n".join(block) for block in blocks])


OPS_INTRODUCTION = """\
Medians of interleaved rounds in one run. A column of another says how many times longer it takes than ours; below 1 it
is faster. Eager is what peers write, torch.compile is that code compiled, products are the bare matrix products that
an op needs. Of each op the largest case is shown; the files hold all, with spreads. Peak is what a call allocates above
its inputs, the error is the largest difference of any output from float64."""
SCALING_INTRODUCTION = """\
Each curve at the largest size that ours ran: its time and its peak above the inputs, then how many times longer others
take and their peaks. If a provider stopped earlier, its cell gives the largest size that it ran and the reason: what
the next size would need, inputs included, is drawn from the sizes before; nine tenths of the free memory may be filled.
The files hold every point."""
TRAINERS_INTRODUCTION = """\
The same work in both, checked, each in a process of its own, medians of the steps after the first; memory is the peak
of the process over what it held when its models were built. TRL takes the policy's log-probabilities from the logits of
generation, so that its scoring has one forward pass fewer. On a CPU TRL's DPO and GRPO project the prompts and the
padding too, which they do not on a GPU; ours never do. GRPO is TRL's trainer in both, "ours" after
`rlhf_kernels.patch("trl")`. `make peers` makes TRL's environments."""
LAYOUTS_INTRODUCTION = """\
PPO on the gold reward of the demo's task, known-optimum score of each seed; and the peak of one PPO step of a model of
50 million random parameters. On a CPU `offload` has nowhere to put weights: it saves memory on a GPU alone."""
RANKINGS_INTRODUCTION = """\
Reward models on the built-in task from as many comparisons, accuracy on held-out pairs, mean ± standard error over
seeds. "Pairs apart" has a row for each pair of a ranking."""


def replaced(text: str, generated: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md: expected the markers {BEGIN} and {END}, found {'one' if begin else 'none'}")
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}"


def main(argv: list[str], readme: Path = ROOT / "README.md", folder: Path = ROOT / "benchmarks/results") -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where README is out of date")
    args = parser.parse_args(argv)
    text = readme.read_text(encoding="utf-8")
    new = replaced(text, section(folder))
    if args.check:
        if new != text:
            print(f"{readme.name} is out of date: run `python -m benchmarks.readme`", file=sys.stderr)
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
