"""Files that are whole or absent: sums of files, and tensors kept under a key that stands for all they depend on."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def sum_of(path: Path) -> str:
    """SHA-256 of what a file holds."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def keep(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """Writes the file beside its place and renames it; OSError where that cannot be, on a full disk, too."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    about = {"sum": _sum(key, tensors)}  # one entry: the order of several changes from file to file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, about)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise error if isinstance(error, OSError) else OSError(str(error)) from error


def kept(path: Path, key: str) -> dict[str, Tensor] | None:
    """What was kept under this key, or None where it is not there, damaged or of another."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return tensors if about == {"sum": _sum(key, tensors)} else None


def _sum(key: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + bytes_of(tensor))
    return digest.hexdigest()
