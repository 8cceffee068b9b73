"""Trackers beside metrics.jsonl: TensorBoard, wandb and trackio, each imported only where it is used.

metrics.jsonl is the whole record. A tracker has a step at most once: a run that continues from a checkpoint computes
again what came after it, which TensorBoard is told to forget and the others are not sent again.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import uuid
from dataclasses import asdict
from pathlib import Path

from rlhf.config import TrainConfig, UsageError


class Tracker:
    """Goes nowhere; the interface of the others. Steps count from 1."""

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Values that are None or not finite are left out."""

    def samples(self, step: int, rows: list[dict]) -> None:
        """A table; all rows have the same columns."""

    def close(self) -> None:
        """Sends what is still to be sent."""


def open_tracker(
    config: TrainConfig,
    folder: Path,  # the run's
    completed: int,  # steps that the run goes on from
) -> Tracker:
    """What report_to asks for. Nothing leaves the machine unless wandb or trackio is named there."""
    name = config.report_to
    try:
        if name == "none":
            return Tracker()
        if name in ("auto", "tensorboard"):
            return TensorBoard(folder, completed)
        return WandbLike(name, config, folder, completed)
    except ImportError as error:
        if name == "auto":
            return Tracker()
        raise UsageError(f"report_to: {name} can't be imported ({error}): pip install {name}") from error
    except Exception as error:  # no account, no network, a broken installation: the line must still name it
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"report_to: {name} can't be used, --report_to none does without: {said}") from error


class TensorBoard(Tracker):
    """Event files in the run's folder: tensorboard --logdir of it, or of what holds several runs."""

    def __init__(self, folder: Path, completed: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=completed + 1)

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        for name, value in _finite(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # by itself only every two minutes, which a killed process would lose; 1 ms for 40 values

    def samples(self, step: int, rows: list[dict]) -> None:
        lines = [[_cell(value) for value in row.values()] for row in rows]
        table = [list(rows[0]), ["---"] * len(rows[0]), *lines]
        self._writer.add_text("samples", "\n".join(f"| {' | '.join(line)} |" for line in table), step)

    def close(self) -> None:
        self._writer.close()


class WandbLike(Tracker):
    """wandb, and trackio, which has functions of the same names. The id of their run stands in the run's folder."""

    def __init__(self, name: str, config: TrainConfig, folder: Path, completed: int):
        self._library = importlib.import_module(name)
        if not hasattr(self._library, "init"):  # a folder of that name, such as wandb writes, can be imported too
            raise ImportError(f"{name} is a folder on the path")
        self._record = folder / f"{name}.json"
        known = json.loads(self._record.read_text()) if completed and self._record.exists() else {}
        self._id, self._sent_before = known.get("id", uuid.uuid4().hex[:8]), known.get("step", 0)
        options = {"project": _project(folder), "config": asdict(config), "resume": "allow"}
        if name == "wandb":
            options |= {"id": self._id, "dir": str(folder), "allow_val_change": True}
        else:
            options |= {"name": self._id, "embed": False}
        self._run = self._library.init(**options)

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        self._send(step, _finite(metrics))

    def samples(self, step: int, rows: list[dict]) -> None:
        table = self._library.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._send(step, {"samples": table})

    def close(self) -> None:
        self._library.finish()

    def _send(self, step: int, values: dict) -> None:
        """Noted before it is sent: after a kill in between, a step is missing there rather than twice."""
        if step <= self._sent_before:
            return
        temporary = self._record.with_suffix(".tmp")
        temporary.write_text(json.dumps({"id": self._id, "step": step}))
        os.replace(temporary, self._record)
        self._run.log(values, step=step)


def _finite(metrics: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}


def _project(folder: Path) -> str:
    """The folder's name in the characters that both allow."""
    return re.sub(r"[^\w.-]+", "-", folder.resolve().name).strip("-")[:128] or "rlhf"


def _cell(value: object) -> str:
    """Of a Markdown table, in which sampled text must stay text."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", " ".join(text.split()))
