"""Checkpoints that are whole or absent, and continue a run bit for bit.

A checkpoint is written beside its place, synced, and renamed; its manifest of sizes and SHA-256 sums comes last. It
holds safetensors and JSON only: weights, optimizer state, random generators, the step (which fixes the data order and
the learning rate), the trainer's own numbers and the configuration.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from dataclasses import asdict
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.config import TrainConfig, TrainingDiverged, UsageError
from rlhf.files import sum_of

# What may differ between a run and its continuation.
FREE_FIELDS = {
    "output_dir", "dataset_cache_dir", "ref_logps_cache_dir", "resume", "save_steps", "save_total_limit", "report_to",
    "device", "sample_steps",
}  # fmt: skip


class CheckpointError(UsageError):
    """A checkpoint that is damaged or belongs to another run."""


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Newest first."""
    return sorted(output_dir.glob("checkpoint-" + "[0-9]" * 6), reverse=True)


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step:06d}"


def save_checkpoint(
    output_dir: Path,
    step: int,  # steps completed
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    state: dict,  # JSON: the trainer's own numbers
    identity: dict,  # what a continuation must agree with
    keep: int,
) -> Path:
    target = checkpoint_path(output_dir, step)
    if target.exists() and not problem_with(target):
        return target
    check_finite(step, modules)
    with_optimizer = _flatten(optimizer)
    generators, numbers = _generators()
    with replacing(target) as folder:
        for name, module in modules.items():
            save_file(_trained(module), str(folder / f"{name}.safetensors"))
        save_file(with_optimizer, str(folder / "optimizer.safetensors"))
        save_file(generators, str(folder / "generators.safetensors"))
        record = {"step": step, "state": state, "identity": identity, "generators": numbers}
        (folder / "state.json").write_text(json.dumps(record))
    older = [path for path in list_checkpoints(output_dir) if path.name < target.name]
    for path in older[keep - 1 :]:
        shutil.rmtree(path)
    return target


def check_finite(step: int, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        if not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
            raise TrainingDiverged(
                f"step {step}: the weights of {name} are not finite and were not written: lower learning_rate"
            )


def load_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    identity: dict,
) -> tuple[int, dict]:  # step, state
    record = json.loads((path / "state.json").read_text())
    for name, now in identity.items():
        if (then := record["identity"].get(name)) != now:
            raise CheckpointError(f"{path}: {name} was {then!r} and is now {now!r}: a run continues as it was begun")
    for name, module in modules.items():
        _load_trained(module, path / f"{name}.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(path / "optimizer.safetensors").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    _restore(load_file(path / "generators.safetensors"), record["generators"])
    return record["step"], record["state"]


def problem_with(path: Path) -> str | None:
    """Why a checkpoint can't be trusted, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"no readable manifest ({error})"
    if "state.json" not in manifest:
        return "no checkpoint but a model: give a folder checkpoint-NNNNNN"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file() or _measure(file) != expected:
            return f"{name} is missing or damaged"
    return None


def identity_of(config: TrainConfig, dataset_fingerprint: str) -> dict:
    free = FREE_FIELDS | {name for name in asdict(config) if name.startswith("warn_")}
    kept = {name: value for name, value in asdict(config).items() if name not in free}
    return kept | {"dataset": dataset_fingerprint}


class replacing:
    """A folder that appears at `target` complete, with its manifest, or not at all. An earlier one goes only then."""

    def __init__(self, target: Path):
        self.target = target
        self.folder, self.earlier = (target.with_name(f".{target.name}.{end}") for end in ("tmp", "old"))

    def __enter__(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        files = sorted(p for p in self.folder.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(self.folder)): _measure(p) for p in files}
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (*files, self.folder / "manifest.json", self.folder):
            _sync(path)
        if self.target.exists():
            shutil.rmtree(self.earlier, ignore_errors=True)
            self.target.rename(self.earlier)
        self.folder.rename(self.target)
        _sync(self.target.parent)
        shutil.rmtree(self.earlier, ignore_errors=True)


def _measure(file: Path) -> list:
    return [file.stat().st_size, sum_of(file)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """What training changes: all parameters, or the adapters among them. A tied one stands there once."""
    return {name: p.detach().contiguous() for name, p in module.named_parameters() if p.requires_grad}


def _load_trained(module: nn.Module, path: Path) -> None:
    ours, theirs = _trained(module), load_file(path)
    if ours.keys() != theirs.keys():
        raise CheckpointError(f"{path}: holds {len(theirs)} tensors that are not those of the {len(ours)} trained here")
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": tensor.contiguous() for index, entry in state.items() for key, tensor in entry.items()}


def seed_generators(seed: int) -> None:
    """The global generators, which reward functions may draw from; the trainer itself doesn't."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _generators() -> tuple[dict[str, Tensor], dict]:
    tensors = {"torch": torch.get_rng_state()}
    tensors |= {
        f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
    }
    kind, keys, *rest = numpy.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}


def _restore(tensors: dict[str, Tensor], numbers: dict) -> None:
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = numbers["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(tensors.pop("torch"))
    for name, state in tensors.items():
        if torch.cuda.is_available() and int(name.removeprefix("cuda")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name.removeprefix("cuda")))


class Stopped(Exception):
    """SIGTERM arrived and the trainer has reached a place where it can stop."""


class StopSignal:
    """SIGTERM as a flag to poll. A second one ends the process at once. Outside the main thread it never fires."""

    received = False

    def __enter__(self) -> StopSignal:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, *_) -> None:
        if self.received:
            os._exit(143)
        self.received = True

    def poll(self) -> None:
        if self.received:
            raise Stopped
