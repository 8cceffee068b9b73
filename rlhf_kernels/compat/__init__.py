"""Functions and classes of other libraries, under their names and with their meaning, on our ops, and `patch`, which
puts them in place.

    rlhf_kernels.patch("trl")                  # from here on TRL's trainers run on our ops
    with rlhf_kernels.patch("verl") as patch:  # or for a while
        print(patch)                           # what was replaced

A module of this package, compat.trl for one, can be imported and used without the library. It says which versions it
stands in for in SUPPORTED, a half-open range, and in REPLACEMENTS what it replaces: {"module.name": the replacement},
where a class or a dict of the module may stand between the two. A private name is replaced only there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

LIBRARIES = ("trl", "verl", "openrlhf")


@dataclass(frozen=True)
class _Replaced:
    """One attribute, named as in REPLACEMENTS."""

    name: str
    old: object
    new: object


_active: dict[str, tuple[_Replaced, ...]] = {}


@dataclass(frozen=True)
class Patch:
    """What `patch` did. As a context manager it takes back, at its end, what this call put in place."""

    library: str
    version: str
    replaced: tuple[str, ...]  # full names, "trl.trainer.utils.selective_log_softmax"
    applied: bool  # False where the library was patched already

    def __str__(self) -> str:
        lines = [f"{self.library} {self.version} on rlhf_kernels:", *self.replaced]
        return "\n  ".join(lines)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_) -> None:
        if self.applied:
            unpatch(self.library)


def patch(library: str) -> Patch:
    """Puts our functions in place of those of "trl", "verl" or "openrlhf", everywhere in the process.

    Every module of the library that holds one of them by that name gets ours, so it does not matter what has been
    imported before; what others took from the library with `from ... import` before this call stays theirs. A second
    call changes nothing. Imports the library's modules concerned.

    Raises ValueError for another name, ModuleNotFoundError where the library is missing, and RuntimeError for a version
    outside the range that was compared with ours, or where the library has none of a function's name.
    """
    ours = _compat(library)
    version = _supported_version(library, ours.SUPPORTED)
    already = library in _active
    if not already:
        found = [_find(library, name, new) for name, new in ours.REPLACEMENTS.items()]  # all, before any is replaced
        for replaced in found:
            _swap(library, replaced.name, replaced.old, replaced.new)
        _active[library] = tuple(found)
    return Patch(library, version, tuple(ours.REPLACEMENTS), applied=not already)


def unpatch(library: str) -> None:
    """Takes back `patch(library)`, also in modules that were imported since; nothing where it is not patched."""
    _compat(library)
    for replaced in _active.pop(library, ()):
        _swap(library, replaced.name, replaced.new, replaced.old)


def _compat(library: str) -> ModuleType:
    if library not in LIBRARIES:
        raise ValueError(f"library: expected one of {', '.join(LIBRARIES)}, got {library!r}")
    return importlib.import_module(f".{library}", __name__)


def _supported_version(library: str, supported: tuple[str, str]) -> str:
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"{library} is not installed here: nothing to patch", name=library) from None
    at_least, below = supported
    if not _release(at_least) <= _release(version) < _release(below):
        raise RuntimeError(
            f"{library}: expected a version >= {at_least} and < {below}, whose functions were compared with ours, got "
            f"{version}; rlhf_kernels.compat.{library} can be called directly with any version"
        )
    return version


def _release(version: str) -> tuple[int, ...]:
    """(1, 16) of "1.16rc1": what decides is the minor version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _owner(name: str) -> tuple[object, str]:
    """The module, class or dict that holds what `name` names, imported, and its name there."""
    path, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(path), attribute
    except ModuleNotFoundError:
        module, _, inner = path.rpartition(".")
        return getattr(importlib.import_module(module), inner), attribute


def _names(owner: object) -> Mapping[str, object]:
    return owner if isinstance(owner, dict) else vars(owner)


def _find(library: str, name: str, new: object) -> _Replaced:
    owner, attribute = _owner(name)
    if attribute not in _names(owner):
        raise RuntimeError(f"{library}: expected {name}, which is not there; nothing was replaced")
    return _Replaced(name, _names(owner)[attribute], new)


def _swap(library: str, name: str, old: object, new: object) -> None:
    """At its home, and in every loaded module of the library that imported it from there under its name; a private name
    only at its home."""
    owner, attribute = _owner(name)
    if isinstance(owner, dict):
        owner[attribute] = new
        return
    setattr(owner, attribute, new)
    if attribute.startswith("_"):
        return
    for path, module in list(sys.modules.items()):
        inside = path == library or path.startswith(f"{library}.")
        if inside and isinstance(module, ModuleType) and vars(module).get(attribute) is old:
            setattr(module, attribute, new)
