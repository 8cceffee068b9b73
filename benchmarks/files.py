"""Files of reports, whole whenever their writer is killed."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, report: dict) -> None:
    write_text(path, json.dumps(report, indent=1) + "\n")


def read_json(path: Path) -> dict | None:
    """None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
