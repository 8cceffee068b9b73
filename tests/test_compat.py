"""patch and unpatch, on a small library of our own, with a real version in its metadata."""

import sys
import textwrap

import pytest

import rlhf_kernels
from rlhf_kernels import compat


@pytest.fixture
def library(tmp_path, monkeypatch):
    """`wordlib` 1.4, as pip leaves it: core defines, eager and late import from it, methods and a registry hold it."""
    files = {
        "wordlib/__init__.py": "",
        "wordlib/core.py": """
            def shout(text): return text.upper()
            def _quiet(text): return text.lower()
            class Speaker:
                def say(self, text): return text + "!"
            REGISTRY = {"shout": shout}
        """,
        "wordlib/eager.py": """
            from wordlib.core import shout, _quiet
            def speak(text): return shout(text)
        """,
        "wordlib/late.py": "from wordlib.core import shout",
        "wordlib-1.4.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: wordlib\nVersion: 1.4.2\n",
        "outside.py": "from wordlib.core import shout",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield "wordlib"
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def ours(library, monkeypatch):
    """Our stand-ins for it, as a module of compat would hold them."""
    from types import ModuleType

    module = ModuleType("rlhf_kernels.compat.wordlib")
    module.SUPPORTED = ("1.4", "1.6")
    module.REPLACEMENTS = {
        "wordlib.core.shout": our_shout,
        "wordlib.core._quiet": our_quiet,
        "wordlib.core.Speaker.say": our_say,
        "wordlib.core.REGISTRY.shout": our_shout,
    }
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(compat, "LIBRARIES", (*compat.LIBRARIES, "wordlib"))
    monkeypatch.setattr(compat, "_active", {})
    return module


def our_shout(text):
    return f"ours: {text}"


def our_quiet(text):
    return f"quiet: {text}"


def our_say(self, text):
    return f"said: {text}"


def test_everywhere_and_back(ours):
    import outside
    from wordlib import core, eager

    theirs, say = core.shout, core.Speaker.say
    done = rlhf_kernels.patch("wordlib")
    assert done.applied and done.version == "1.4.2" and done.replaced == tuple(ours.REPLACEMENTS)
    assert core.shout is eager.shout is core.REGISTRY["shout"] is our_shout
    assert eager.speak("a") == "ours: a" and core.Speaker().say("a") == "said: a"
    assert core._quiet is our_quiet and eager._quiet is not our_quiet, "a private name only at its home"
    assert outside.shout is theirs, "what others took stays theirs"
    from wordlib import late

    assert late.shout is our_shout
    rlhf_kernels.unpatch("wordlib")
    assert core.shout is eager.shout is late.shout is core.REGISTRY["shout"] is theirs
    assert core.Speaker.say is say and core._quiet("A") == "a"


def test_twice_is_once(ours):
    from wordlib import core

    theirs = core.shout
    assert rlhf_kernels.patch("wordlib").applied
    again = rlhf_kernels.patch("wordlib")
    assert not again.applied and again.replaced == tuple(ours.REPLACEMENTS)
    rlhf_kernels.unpatch("wordlib")
    rlhf_kernels.unpatch("wordlib")
    assert core.shout is theirs


def test_for_a_while(ours):
    from wordlib import core

    theirs = core.shout
    with rlhf_kernels.patch("wordlib") as outer:
        with rlhf_kernels.patch("wordlib") as inner:
            assert outer.applied and not inner.applied
        assert core.shout is our_shout, "the inner block did not put it in place"
    assert core.shout is theirs
    with pytest.raises(ZeroDivisionError), rlhf_kernels.patch("wordlib"):
        _ = 1 / 0
    assert core.shout is theirs


def test_says_what_it_did(ours):
    with rlhf_kernels.patch("wordlib") as done:
        assert str(done).splitlines()[0] == "wordlib 1.4.2 on rlhf_kernels:"
        assert "wordlib.core.Speaker.say" in str(done)


@pytest.mark.parametrize(("low", "high"), [("1.5", "1.6"), ("1.2", "1.4")])
def test_unknown_version_is_refused(ours, low, high):
    from wordlib import core

    theirs, ours.SUPPORTED = core.shout, (low, high)
    with pytest.raises(RuntimeError, match=rf"wordlib: expected a version >= {low} and < {high}.* got 1\.4\.2"):
        rlhf_kernels.patch("wordlib")
    assert core.shout is theirs


@pytest.mark.parametrize(
    "missing", ["wordlib.core.whisper", "wordlib.core.REGISTRY.whisper", "wordlib.core.Singer.sing", "wordlib.new.f"]
)
def test_missing_name_leaves_everything_as_it_was(ours, missing):
    from wordlib import core

    theirs = core.shout
    ours.REPLACEMENTS[missing] = our_quiet
    with pytest.raises(RuntimeError, match=f"expected {missing}, which is not there; nothing was replaced"):
        rlhf_kernels.patch("wordlib")
    assert core.shout is theirs and core.REGISTRY["shout"] is theirs
    assert not compat._active


def test_modules_that_lack_a_package_are_left_and_listed(ours, tmp_path):
    """What cannot be imported here cannot run here."""
    from wordlib import core

    (tmp_path / "wordlib" / "fast.py").write_text("import no_such_gpu_package\ndef shout(text): ...\n")
    ours.REPLACEMENTS["wordlib.fast.shout"] = our_shout
    with rlhf_kernels.patch("wordlib") as done:
        assert core.shout is our_shout and "wordlib.fast.shout" not in done.replaced
        assert done.left == ("wordlib.fast.shout: no no_such_gpu_package",) and done.left[0] in str(done)
        assert rlhf_kernels.patch("wordlib").left == done.left
    ours.REPLACEMENTS = {"wordlib.fast.shout": our_shout}
    with pytest.raises(ModuleNotFoundError, match=r"none of it can be imported here; wordlib\.fast.*no_such_gpu"):
        rlhf_kernels.patch("wordlib")
    assert not compat._active


def test_a_module_that_does_not_load_is_left_and_listed(ours, tmp_path):
    """An extension that was built for another torch, for one."""
    (tmp_path / "wordlib" / "built.py").write_text("raise ImportError('undefined symbol: _Z')\ndef shout(text): ...\n")
    ours.REPLACEMENTS["wordlib.built.shout"] = our_shout
    with rlhf_kernels.patch("wordlib") as done:
        assert done.left == ("wordlib.built.shout: undefined symbol: _Z",)


def test_other_libraries():
    with pytest.raises(ValueError, match="expected one of trl, verl, openrlhf, got 'tlr'"):
        rlhf_kernels.patch("tlr")
    with pytest.raises(ValueError, match="got 'ray'"):
        rlhf_kernels.unpatch("ray")


def test_a_library_that_is_not_installed(monkeypatch):
    def missing(name):
        raise compat.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat.importlib.metadata, "version", missing)
    with pytest.raises(ModuleNotFoundError, match="verl is not installed here"):
        rlhf_kernels.patch("verl")


@pytest.mark.parametrize("library", compat.LIBRARIES)
def test_modules_need_no_library(library):
    """And every replacement has its name, where the library's name is not another's import."""
    module = compat._compat(library)
    assert library not in sys.modules or library == "trl"
    assert module.REPLACEMENTS and all(name.startswith(f"{library}.") for name in module.REPLACEMENTS)
    for name, new in module.REPLACEMENTS.items():
        last = name.rpartition(".")[2]
        assert last.startswith("_") or name.rpartition(".")[0].endswith("REGISTRY") or new.__name__ == last
