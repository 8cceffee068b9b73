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


@dataclass(frozen=True)
class _Active:
    replaced: tuple[_Replaced, ...]
    left: tuple[str, ...]  # as Patch has it


_active: dict[str, _Active] = {}


@dataclass(frozen=True)
class Patch:
    """What `patch` did. As a context manager it takes back, at its end, what this call put in place."""

    library: str
    version: str
    replaced: tuple[str, ...]  # full names, "trl.trainer.utils.selective_log_softmax"
    applied: bool  # False where the library was patched already
    left: tuple[str, ...] = ()  # "name: why", of modules that cannot be imported here

    def __str__(self) -> str:
        left = [f"left as it is, {name}" for name in self.left]
        return "\n  ".join([f"{self.library} {self.version} on rlhf_kernels:", *self.replaced, *left])

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_) -> None:
        if self.applied:
            unpatch(self.library)


def patch(library: str) -> Patch:
    """Puts our functions in place of those of "trl", "verl" or "openrlhf", everywhere in the process.

    Every module of the library that holds one of them by that name gets ours, so it does not matter what has been
    imported before; what others took from the library with `from ... import` before this call stays theirs. A second
    call changes nothing. Imports the library's modules concerned; what a module defines that lacks a package here, as
    OpenRLHF's experience maker does without vLLM, is left and listed.

    Raises ValueError for another name, ModuleNotFoundError where the library is missing or all of its modules lack a
    package, and RuntimeError for a version outside the range that was compared with ours, or where the library has none
    of a function's name.
    """
    ours = _compat(library)
    version = _supported_version(library, ours.SUPPORTED)
    already = library in _active
    if not already:
        found = _find_all(library, ours.REPLACEMENTS)  # all, before any is replaced
        for one in found.replaced:
            _swap(library, one.name, one.old, one.new)
        _active[library] = found
    active = _active[library]
    return Patch(library, version, tuple(one.name for one in active.replaced), not already, active.left)


def unpatch(library: str) -> None:
    """Takes back `patch(library)`, also in modules that were imported since; nothing where it is not patched."""
    _compat(library)
    if library in _active:
        for one in _active.pop(library).replaced:
            _swap(library, one.name, one.new, one.old)


def _compat(library: str) -> ModuleType:
    if library not in LIBRARIES:
        raise ValueError(f"library: expected one of {', '.join(LIBRARIES)}, got {library!r}")
    return importlib.import_module(f".{library}", __name__)


def _supported_version(library: str, supported: tuple[str, str]) -> str:
    at_least, below = supported
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        told = f"{library} is not installed here: nothing to patch; pip install '{library}>={at_least},<{below}'"
        raise ModuleNotFoundError(told, name=library) from None
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
    except ModuleNotFoundError as error:
        if error.name != path:  # the module is there, and lacks another
            raise
        module, _, inner = path.rpartition(".")
        return getattr(importlib.import_module(module), inner, {}), attribute


def _names(owner: object) -> Mapping[str, object]:
    return owner if isinstance(owner, dict) else vars(owner)


def _find_all(library: str, replacements: Mapping[str, object]) -> _Active:
    found, left = [], []
    for name, new in replacements.items():
        try:
            owner, attribute = _owner(name)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError)
            if not missing or error.name.partition(".")[0] != library:
                left.append(f"{name}: {f'no {error.name}' if missing else str(error).strip()}")
                continue
            owner, attribute = {}, name  # the library has no such module
        if attribute not in _names(owner):
            raise RuntimeError(f"{library}: expected {name}, which is not there; nothing was replaced")
        found.append(_Replaced(name, _names(owner)[attribute], new))
    if not found:
        raise ModuleNotFoundError(f"{library}: nothing to patch, none of it can be imported here; {left[0]}")
    return _Active(tuple(found), tuple(left))


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
