"""Shared fixtures: seeds, the battery's parameters, the device marker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_models import (  # noqa: F401, fixtures of the trainer's tests
    chat_model,
    corpus,
    dialogues,
    labelled,
    one_thread,
    pairs,
    tiny_model,
    tiny_reward_model,
)

from rlhf_kernels import testing

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = (
    ROOT.parent / "shared" / "data"
)  # real input for trying the trainer; tests that use it skip where it is absent


def pytest_configure(config):
    torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="torch sees no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def battery(op: str):
    """Parameters (backend, case, check) of an op: a small grid, and a large one marked slow."""
    params = []
    for backend in testing.available_backends(op):
        for case in testing.cases(op, large=True):
            marks = [pytest.mark.slow] if case.large else []
            for check in testing.checks_of(case):
                params.append(pytest.param(backend, case, check, id=f"{backend}-{case.name}-{check}", marks=marks))
    return pytest.mark.parametrize(("backend", "case", "check"), params)
