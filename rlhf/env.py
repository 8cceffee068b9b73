"""What to paste in a bug report."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import rlhf_kernels
from rlhf.config import EnvConfig

PACKAGES = ["torch", "triton", "transformers", "tokenizers", "safetensors", "datasets", "jsonargparse", "numpy"]


def report(config: EnvConfig) -> str:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["no GPU"]
    rows = [
        ("rlhf_kernels", rlhf_kernels.__version__),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
        ("devices", "; ".join(devices)),
        ("cuda", str(torch.version.cuda)),
        *((package, version(package)) for package in PACKAGES),
    ]
    table = "\n".join(f"{name:<14}{value}" for name, value in rows)
    return f"{table}\n\n{rlhf_kernels.backends()}"


def main(config: EnvConfig) -> None:
    print(report(config))
