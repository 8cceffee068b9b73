"""Trackers get each step once, also over a restart, and nothing is imported or sent that was not asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest

from rlhf import sft
from rlhf.config import SFTConfig, UsageError
from rlhf.track import Tracker, _cell, _project, open_tracker

ROWS = [{"prompt": "a | b", "completion": "c\n<d>", "score": 0.5}, {"prompt": "e", "completion": "", "score": -1.0}]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "my run").mkdir()
    return tmp_path / "my run"


def config_for(folder: Path, report_to: str) -> SFTConfig:
    return SFTConfig(model_name_or_path="m", dataset_name="d", output_dir=str(folder), report_to=report_to)


def tracker_of(folder: Path, report_to: str, completed: int = 0) -> Tracker:
    return open_tracker(config_for(folder, report_to), folder, completed)


def stopped_and_continued(folder: Path, report_to: str) -> None:
    """Five steps, of which a checkpoint has three; then the fourth to the sixth, with other values."""
    for completed, steps, offset in ((0, range(1, 6), 0.0), (3, range(4, 7), 100.0)):
        tracker = tracker_of(folder, report_to, completed)
        for step in steps:
            if step % 2 == 0:
                tracker.samples(step, ROWS)
            tracker.log(step, {"loss": step + offset, "lr": None, "bad": float("nan"), "tokens": 7})
        tracker.close()


# Each library


class FakeWandb(ModuleType):
    """As much of wandb as is used; a run is an id, and refuses a step that goes back, as wandb's do."""

    def __init__(self, fails: Exception | None = None):
        super().__init__("wandb")
        self.runs, self.calls, self.fails = {}, [], fails

    class Table:
        def __init__(self, columns: list[str], data: list[list]):
            self.columns, self.data = columns, data

    def init(self, *, project, id, config, resume, dir, allow_val_change):
        if self.fails:
            raise self.fails
        self.calls.append({"project": project, "id": id, "config": config, "resume": resume, "dir": dir})
        self.current = FakeRun(self.runs.setdefault(id, []))
        return self.current

    def finish(self) -> None:
        self.current.open = False


class FakeRun:
    def __init__(self, rows: list):
        self.rows, self.open = rows, True

    def log(self, values: dict, step: int) -> None:
        assert self.open and (not self.rows or step >= self.rows[-1][0])
        self.rows.append((step, values))


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_each_step_once_under_one_id(wandb, folder):
    stopped_and_continued(folder, "wandb")
    first, second = wandb.calls
    assert first == second and not wandb.current.open and list(wandb.runs) == [first["id"]]
    assert (first["project"], first["resume"], first["dir"]) == ("my-run", "allow", str(folder))
    assert first["config"] == asdict(config_for(folder, "wandb"))
    [rows] = wandb.runs.values()
    metrics = [(step, values) for step, values in rows if "samples" not in values]
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 106.0]  # the second time 4 and 5 were there already
    assert metrics == [(step, {"loss": loss, "tokens": 7}) for step, loss in enumerate(losses, 1)]
    tables = {step: values["samples"] for step, values in rows if "samples" in values}
    assert list(tables) == [2, 4, 6] and tables[2].columns == ["prompt", "completion", "score"]
    assert tables[2].data == [["a | b", "c\n<d>", 0.5], ["e", "", -1.0]]
    assert sorted(path.name for path in folder.iterdir()) == ["wandb.json"]


def test_a_run_from_scratch_in_the_same_folder_is_another(wandb, folder):
    for _ in range(2):
        tracker = tracker_of(folder, "wandb")
        tracker.log(1, {"loss": 1.0})
    assert list(wandb.runs.values()) == [[(1, {"loss": 1.0})]] * 2


def test_a_kill_while_a_step_is_sent_does_not_send_it_twice(wandb, folder, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    tracker = tracker_of(folder, "wandb")
    tracker.log(1, {"loss": 1.0})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FakeRun, "log", killed)
        tracker.log(2, {"loss": 2.0})
    tracker = tracker_of(folder, "wandb", completed=1)
    for step in (2, 3):
        tracker.log(step, {"loss": float(step)})
    assert list(wandb.runs.values()) == [[(1, {"loss": 1.0}), (3, {"loss": 3.0})]]


def shown_by_tensorboard(folder: Path) -> dict[str, list[tuple]]:
    """(step, value) of each name, as TensorBoard's own reader has them."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder))
    events.Reload()
    names = events.Tags()["tensors"]
    return {name: [(e.step, make_ndarray(e.tensor_proto).item()) for e in events.Tensors(name)] for name in names}


def test_tensorboard_has_each_step_once(folder):
    pytest.importorskip("tensorboard")
    stopped_and_continued(folder, "tensorboard")
    shown = shown_by_tensorboard(folder)
    texts = dict(shown.pop("samples/text_summary"))
    losses = [1.0, 2.0, 3.0, 104.0, 105.0, 106.0]  # what came after the checkpoint is forgotten
    assert shown == {"loss": list(enumerate(losses, 1)), "tokens": [(step, 7.0) for step in range(1, 7)]}
    assert list(texts) == [2, 4, 6]
    assert texts[2].decode().split("\n") == [
        "| prompt | completion | score |",
        "| --- | --- | --- |",
        r"| a \| b | c \<d\> | 0.5 |",
        "| e |  | -1 |",
    ]


def test_tensorboard_keeps_what_a_killed_run_logged(folder):
    pytest.importorskip("tensorboard")
    if (child := os.fork()) == 0:
        tracker_of(folder, "tensorboard").log(1, {"loss": 1.0})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert shown_by_tensorboard(folder) == {"loss": [(1, 1.0)]}


def test_trackio_has_each_step_once(folder, tmp_path):
    """In a process of its own: where trackio keeps its data is read when it is imported."""
    pytest.importorskip("trackio")
    code = """if 1:
        import json, sys
        from pathlib import Path
        import test_track
        test_track.stopped_and_continued(Path(sys.argv[1]), "trackio")
        from trackio.sqlite_storage import SQLiteStorage
        [run] = SQLiteStorage.get_runs("my-run")
        Path(sys.argv[2]).write_text(json.dumps(SQLiteStorage.get_logs("my-run", run)))
    """
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "rows.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 106.0]
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == list(enumerate(losses, 1))
    assert [row["step"] for row in rows if "samples" in row] == [2, 4, 6]


# What is asked for


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_one_line(folder, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UsageError, match=rf"^report_to: {name} can't be imported \(.*\): pip install {name}$"):
        tracker_of(folder, name)
    assert list(folder.iterdir()) == []


def test_a_folder_named_wandb_is_not_wandb(folder, tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UsageError, match=r"trackio can't be imported \(trackio is a folder on the path\)"):
        tracker_of(folder, "trackio")


def test_a_tracker_that_refuses_is_one_line(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(RuntimeError("no API key:\nuse `wandb login`")))
    expected = r"^report_to: wandb can't be used, --report_to none does without: RuntimeError: no API key: use `wandb"
    with pytest.raises(UsageError, match=expected):
        tracker_of(folder, "wandb")


def test_auto_is_tensorboard_or_nothing(wandb, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    stopped_and_continued(folder, "auto")
    assert list(folder.iterdir()) == [] and wandb.calls == []
    monkeypatch.delitem(sys.modules, "tensorboard")
    pytest.importorskip("tensorboard")
    stopped_and_continued(folder, "auto")
    assert all(path.name.startswith("events.out.tfevents.") for path in folder.iterdir()) and wandb.calls == []


def test_none_is_nothing(wandb, folder):
    stopped_and_continued(folder, "none")
    assert list(folder.iterdir()) == [] and wandb.calls == []


def test_importing_the_trainer_imports_no_tracker():
    code = "import sys, rlhf.track; print({'wandb', 'trackio', 'tensorboard', 'torch'} & sys.modules.keys())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    ("path", "project"), [("runs/ppo-1", "ppo-1"), ("a/b c:d", "b-c-d"), ("/", "rlhf"), ("x/%%", "rlhf")]
)
def test_a_project_is_named_as_the_folder(path, project):
    assert _project(Path(path)) == project


def test_sampled_text_is_not_read_as_markdown():
    assert _cell("a|b\n# c `d` <i>") == r"a\|b \# c \`d\` \<i\>" and _cell(0.123456) == "0.1235" and _cell(3) == "3"


# A run


@pytest.mark.usefixtures("one_thread")
def test_a_run_goes_on_in_its_tracker_after_sigterm(wandb, tiny_model, corpus, tmp_path, monkeypatch):
    """The checkpoint is written before the tracker is closed, which may wait for a network."""
    order = []
    monkeypatch.setattr(wandb, "finish", lambda: order.append([p.name for p in tmp_path.glob("checkpoint-*")]))
    config = SFTConfig(
        model_name_or_path=tiny_model, dataset_name=corpus, output_dir=str(tmp_path), device="cpu", max_length=16,
        max_steps=4, report_to="wandb",
    )  # fmt: skip
    with pytest.raises(SystemExit):
        sft.train(config, on_step=lambda step, *_: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
    assert order == [["checkpoint-000002"]]
    sft.train(replace(config, resume="auto"))
    [rows] = wandb.runs.values()
    assert [step for step, _ in rows] == [1, 2, 3, 4] and len(order) == 2
    expected = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in rows] == expected
