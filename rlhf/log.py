"""A run's directory: metrics.jsonl, samples.jsonl, config.yaml, checkpoints and final/, with progress on the screen."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from torch import nn

from rlhf.checkpoint import (
    CheckpointError,
    Stopped,
    StopSignal,
    check_finite,
    checkpoint_path,
    identity_of,
    list_checkpoints,
    load_checkpoint,
    problem_with,
    replacing,
    save_checkpoint,
    seed_generators,
)
from rlhf.config import RunConfig, TrainConfig, UsageError
from rlhf.data import Dataset
from rlhf.model import LanguageModel, Scorer, choose_device, save
from rlhf.track import open_tracker
from rlhf.types import TrainResult

LOGS = ("metrics.jsonl", "samples.jsonl", "warnings.jsonl")  # rows with their step


class Run:
    """Where a training run stands and what it writes. Leaving the block on SIGTERM saves and exits with status 143.

    with Run(config, {"policy": module}, optimizer, dataset, total) as run:
        for step in run.steps():
            run.poll()                    # between micro-batches, where stopping loses nothing
            run.finish(step, metrics)     # logs, and saves when it is due
        return run.result(model)
    """

    def __init__(
        self,
        config: TrainConfig,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        dataset: Dataset,
        total: int,
        others: dict[str, str] | None = None,  # fingerprints of what is read beside the dataset
    ):
        self.config, self.modules, self.optimizer, self.total = config, modules, optimizer, total
        self.folder = make_folder(config)
        self.dataset, self._told = dataset, ("", 0)  # what was said of it: counts, and how many reasons
        self.identity = identity_of(config, dataset.fingerprint()) | (others or {})
        self.state: dict = {"metrics": {}}  # the last step's, and the trainer's own numbers: part of every checkpoint
        self.completed = 0
        self.stop = StopSignal()
        seed_generators(config.seed)
        self._resume()
        for name in LOGS:
            _keep_until(self.folder / name, self.completed)
        save_config(config)
        device, dtype = choose_device(config)
        say(f"{self.folder}: {device.type}, {dtype} compute; steps {self.completed + 1} to {total}")
        self._tell_of_rows()

    def _tell_of_rows(self) -> None:
        """What is not said yet: those of a stream are counted as they come."""
        counts, reasons = self.dataset.notes, self.dataset.reasons
        told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        if told != self._told[0]:
            say(f"{self.folder}: {told}")
        for reason in reasons[self._told[1] :]:
            say(f"skipped {reason}")
        self._told = told, len(reasons)

    def _resume(self) -> None:
        choice, found = self.config.resume, list_checkpoints(self.folder)
        candidates = {"no": [], "auto": found}.get(choice, [Path(choice)])
        if choice != "auto" and not any(path.resolve().parent == self.folder.resolve() for path in candidates):
            self._refuse_an_earlier_run(found)
        for path in candidates:
            if problem := problem_with(path):
                if choice != "auto":
                    raise CheckpointError(f"{path}: {problem}")
                say(f"{path}: {problem}; trying an older one")
                continue
            self.completed, self.state = load_checkpoint(path, self.modules, self.optimizer, self.identity)
            say(f"continuing from {path}")
            for newer in found:
                if newer.name > checkpoint_path(self.folder, self.completed).name:
                    say(f"{newer}: removed, as the run goes on from before it")
                    shutil.rmtree(newer)
            return
        if candidates:
            way_out = "remove them to start from scratch, or use another output_dir"
            raise CheckpointError(f"{self.folder}: none of its {len(found)} checkpoints is whole: {way_out}")

    def _refuse_an_earlier_run(self, checkpoints: list[Path]) -> None:
        files = [self.folder / name for name in LOGS]
        if checkpoints or (self.folder / "final").exists() or any(f.exists() and f.stat().st_size for f in files):
            way_out = f"use --resume auto to {'continue' if checkpoints else 'write over'} it, or another output_dir"
            raise CheckpointError(f"{self.folder}: holds an earlier run: {way_out}")

    def __enter__(self) -> Run:
        from tqdm import tqdm

        self._tracker = open_tracker(self.config, self.folder, self.completed)
        self.stop.__enter__()
        self._metrics_file = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._bar = tqdm(total=self.total, initial=self.completed, disable=None, desc=self.folder.name)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._bar.close()
        self._metrics_file.close()
        self.stop.__exit__()
        try:
            if kind is Stopped:
                say(f"stopped by SIGTERM; saved {self.save()}")
                raise SystemExit(143)
        finally:  # after the checkpoint: it may wait for a network
            self._tracker.close()

    def poll(self) -> None:
        self.stop.poll()

    def stopping(self) -> bool:
        return self.stop.received

    def steps(self) -> Iterator[int]:
        for step in range(self.completed, self.total):
            self._since = time.perf_counter()
            yield step

    def finish(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Logs a step that is done, and returns its metrics (which count `tokens`) with time and memory added."""
        seconds = time.perf_counter() - self._since
        metrics = metrics | {"timing/step": seconds, "tokens_per_second": metrics["tokens"] / seconds}
        metrics["memory/peak_gb"] = _peak_memory()
        self.completed, self.state["metrics"] = step + 1, metrics
        shown = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._metrics_file.write(json.dumps({"step": step + 1, **shown}) + "\n")
        self._metrics_file.flush()
        self._tracker.log(step + 1, shown)
        self._bar.update()
        if self.config.save_steps and (step + 1) % self.config.save_steps == 0:
            self.save()
        return metrics

    def save(self) -> Path:
        keep = self.config.save_total_limit
        return save_checkpoint(
            self.folder, self.completed, self.modules, self.optimizer, self.state, self.identity, keep
        )

    def keep_best(self, model: LanguageModel, name: str | None, metrics: dict[str, float]) -> None:
        """Writes the model to best/ where the named metric is the highest so far."""
        if name is None:
            return
        if metrics[name] > self.state.get("best", -math.inf):
            self.state["best"] = metrics[name]
            with replacing(self.folder / "best") as folder:
                save(model, folder)

    def warn(self, step: int, lines: list[str]) -> None:
        """On the screen, and in warnings.jsonl."""
        for line in lines:
            say(line)
        _append(self.folder / "warnings.jsonl", [{"step": step + 1, "warning": line} for line in lines])

    def samples(self, step: int, rows: list[dict]) -> None:
        write_samples(self.folder, [{"step": step + 1, **row} for row in rows])
        self._tracker.samples(step + 1, rows)
        show_table(f"step {step + 1}", rows[:4])

    def result(self, model: LanguageModel | Scorer) -> TrainResult:
        """Writes final/."""
        self._tell_of_rows()
        check_finite(self.completed, self.modules)
        with replacing(self.folder / "final") as folder:
            save(model, folder)
        return TrainResult(self.folder, self.folder / "final", self.completed, self.state["metrics"])


class Clock:
    """Seconds between laps."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"timing/{name}"], self._since = now - self._since, now


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def say_how_logprobs_are_formed(model: LanguageModel) -> None:
    if not model.head.fused:
        say(f"log-probabilities are taken from whole logits, which costs memory: {model.head.reason}")
    if model.padded_because:
        say(f"sequences are padded: {model.padded_because}")


def make_folder(config: RunConfig) -> Path:
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output_dir: cannot be made: {error}") from error
    return folder


def refuse_training_run(folder: Path, wanted: str) -> None:
    """Of commands that write but once: not over what a run needs to go on."""
    if (folder / "metrics.jsonl").exists():
        raise UsageError(f"output_dir: {folder} holds a training run: use another output_dir for {wanted}")


def save_config(config: RunConfig) -> None:
    """config.yaml, which --config takes."""
    (make_folder(config) / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")


def write_samples(folder: Path, rows: list[dict]) -> None:
    _append(folder / "samples.jsonl", rows)


def _append(path: Path, rows: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def show_table(title: str, rows: list[dict], ruled: bool = True) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def cell(value: object) -> str:
        text = f"{value:.3f}" if isinstance(value, float) else str(value).strip()
        return escape(text if len(text) <= 240 else f"{text[:40]} … {text[-200:]}")

    table = Table(*rows[0], title=title, show_lines=ruled)
    for row in rows:
        table.add_row(*map(cell, row.values()))
    Console().print(table)


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines after a step: a continued run writes them again."""
    if step == 0:
        path.unlink(missing_ok=True)
    elif path.exists():
        with path.open("rb") as file:
            kept = [line for line in file if line.endswith(b"\n") and json.loads(line)["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)


def _peak_memory() -> float:
    """GB of device memory where there is a GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_of_process() / 1e9


def peak_of_process() -> int:
    """Bytes. Linux's own count begins with the program; ru_maxrss begins with what the parent held when it forked."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
