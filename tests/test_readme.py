"""README's performance section: what is in the files is in it, and it is up to date."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks import readme

OPS = {
    "format": 2,
    "machine": {
        "device": "cpu", "device_name": "Some CPU", "cpu_isa": "avx2", "threads": 2, "cores": 4, "torch": "2.13.0",
        "python": "3.11.7", "triton": None, "date": "2026-01-01T00:00:00+00:00", "peers": {"trl": "1.16.0"},
        "argv": ["--device", "cpu"],
    },
}  # fmt: skip


def case(op: str, seconds: dict[str, float], shape=(8, 64), **others) -> dict:
    providers = {
        name: {"median_s": s, "peak_bytes": 5_000_000, "max_abs_error": {"a": 2e-7, "b": 1e-7}}
        for name, s in seconds.items()
    }
    known = {"op": op, "mode": "forward", "shape": list(shape), "dtype": "float32", "bytes_moved": 4 * shape[0]}
    return known | {"load_average": 1.5, "providers": providers} | others


def written(folder: Path, name: str, results: list[dict], report: dict = OPS, **machine) -> None:
    report = copy.deepcopy(report) | {"results": results}
    report["machine"] |= machine
    (folder / name).write_text(json.dumps(report), encoding="utf-8")


def rows(text: str, start: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {start}")]


def test_readme_is_up_to_date():
    assert readme.main(["--check"]) == 0


def test_check_fails_until_the_section_is_written(tmp_path, capsys):
    page, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    page.write_text(f"above\n{readme.BEGIN}\n{readme.END}\nbelow\n", encoding="utf-8")
    written(folder, "a.json", [case("gae", {"ours": 0.001, "eager": 0.0905})])
    assert readme.main(["--check"], page, folder) == 1 and "out of date" in capsys.readouterr().err
    assert readme.main([], page, folder) == 0 and readme.main(["--check"], page, folder) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n") and text.endswith("below\n") and "90.5x" in text
    written(folder, "a.json", [case("gae", {"ours": 0.001, "eager": 0.0906})])
    assert readme.main(["--check"], page, folder) == 1


@pytest.mark.parametrize("text", ["nothing", f"{readme.BEGIN} alone"])
def test_markers_that_are_missing_are_named(tmp_path, text):
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="markers"):
        readme.main([], tmp_path / "README.md", tmp_path)


def test_an_ops_row_is_its_newest_file_and_largest_case(tmp_path):
    """And whatever is slower is said, of cases that are not in the table, too."""
    written(tmp_path, "old.json", [case("gae", {"ours": 9.0}), case("token_kl", {"ours": 0.25, "trl": 0.5})])
    new = [
        case("gae", {"ours": 0.002, "eager": 0.02, "compile": 0.001}, (8, 64)),
        case("gae", {"ours": 0.004, "eager": 0.044, "compile": 0.008, "products": 0.002}, (512, 2048)),
        case("gae", {"ours": 0.003, "eager": 0.03}, (4, 4), dtype="bfloat16", sizes={"sequences": 4, "length": 4}),
    ]
    written(tmp_path, "new.json", new, date="2026-01-02T00:00:00+00:00")
    text = "\n\n".join(readme.ops(readme.read(tmp_path), "cpu"))
    both = ["5, 5", "2e-07, 2e-07"]
    assert rows(text, "`gae`") == [
        ["`gae` forward", "512 x 2,048", "4.00", "11.0x", "2.00x", "0.50x", *both],
        ["`gae` forward, bfloat16", "4 x 4", "3.00", "10.0x", "", "", *both],
    ]
    assert rows(text, "`token_kl`") == [["`token_kl` forward", "8 x 64", "250", "2.00x", "5", "2e-07"]]
    assert "TRL 1.16.0" in text and "Some CPU (avx2), 2 of 4 cores" in text and "`python -m benchmarks --device" in text
    assert "Where another is faster: `gae` forward at 8 x 64: torch.compile 0.50x." in text


def test_a_curve_says_how_far_each_came(tmp_path):
    first = case("gae", {"ours": 0.001, "eager": 0.01, "trl": 0.2}, sizes={"tokens": 8, "vocabulary": 1000})
    last = case("gae", {"ours": 0.002, "eager": 0.03}, sizes={"tokens": 16, "vocabulary": 1000}) | {"load_average": 3.0}
    curve = {"op": "gae", "mode": "forward", "dtype": "float32", "x_name": "tokens", "points": [first, last]}
    curve |= {"stopped": {"trl": "would need 9.0 GB of 2.0 GB that are free", "verl": "its kernels need a GPU"}}
    full = curve | {"x_name": "vocabulary", "stopped": {"ours": "would need 3.0 GB"}, "points": [last]}
    never = curve | {"x_name": "length", "points": []}
    written(tmp_path, "s.json", [], OPS | {"scaling": [curve, full, never]})
    text = "\n\n".join(readme.scaling(readme.read(tmp_path), "cpu"))
    full_ends = "ends there: would need 3.0 GB"
    ends = "ends at 8: would need 9.0 GB of 2.0 GB that are free"
    assert rows(text, "`gae`") == [
        ["`gae` forward", "tokens, to 16", "vocabulary 1,000", "2.00, 5", "15.0x, 5", ends],
        ["`gae` forward", "vocabulary, to 1,000", "tokens 16", f"2.00, 5; {full_ends}", "15.0x, 5"],
    ]
    assert "load average at most 3.0" in text and "length" not in text


def test_a_gpu_is_pending_until_make_gpu_has_timed_one(tmp_path):
    written(tmp_path, "cpu.json", [case("gae", {"ours": 1.0})])
    assert readme.PENDING in readme.section(tmp_path)
    parts = {"device": "cuda", "driver": "NVIDIA H200, 580.65", "steps": {}, "sanitizer": None}
    parts |= dict.fromkeys(("ops", "ops_compile", "trainer"))
    parts["tests"] = {"passed": 500, "failed": 1, "skipped": 2, "failures": [], "killed": True}
    parts["large_tests"] = {"passed": 7, "failed": 0, "skipped": 0, "failures": []}
    (tmp_path / "nvidia-h200-2026-01-03.json").write_text(json.dumps(parts), encoding="utf-8")
    text = readme.section(tmp_path)
    assert readme.PENDING in text
    assert "NVIDIA H200, 580.65: tests 507 passed, 1 failed, 2 skipped, not all ran ([file]" in text
    failed = case("gae", {"ours": 2e-3}, (4, 4), failed={"compile": "out of memory"})
    timed = {
        "ops": [case("gae", {"ours": 1e-3, "eager": 4e-3})],
        "ops_compile": [case("gae", {"ours": 1e-3, "compile": 3e-3}), failed],
    }
    for day, (name, results) in enumerate(timed.items(), start=1):
        machine = OPS["machine"] | {"device": "cuda", "device_name": "NVIDIA H200", "date": f"2026-01-0{day}"}
        parts[name] = {"machine": machine, "results": results, "refused": {"token_kl": "wrong by 1"}}
    (tmp_path / "nvidia-h200-2026-01-03.json").write_text(json.dumps(parts), encoding="utf-8")
    text = readme.section(tmp_path)
    assert readme.PENDING not in text and "NVIDIA H200, 2 of 4 cores" in text and "`make gpu`" in text
    on_gpu = rows(text.partition("### On a GPU")[2], "`gae`")
    assert [row[2:4] for row in on_gpu] == [["1.00", "3.00x"], ["1.00", "4.00x"]]
    assert "Not timed, for it failed there: `token_kl`, wrong by 1" in text


def test_a_trainers_row_says_what_each_did_and_where(tmp_path):
    policy = {"kind": "llama", "width": 128, "layers": 4, "heads": 4}
    settings = {"trainer": "dpo", "policy": policy, "vocab": 512, "pairs": 4, "shortest": 20, "longest": 1000}
    ours = {"step_s": 0.5, "growth_bytes": 1e9, "phases_s": {"gradient": 0.4, "rest": 0.1}, "load_average": 2.0}
    theirs = ours | {"step_s": 2.0, "growth_bytes": 3e9, "phases_s": {"gradient": 1.5, "rest": 0.5}}
    row = {"trainer": "dpo", "name": "vocabulary 512", "settings": settings, "providers": {"rlhf": ours, "trl": theirs}}
    ppo = {"trainer": "ppo", "prompts": 8, "prompt_length": 5, "response_length": 9, "shortest": 9, "epochs": 1}
    alone = row | {"trainer": "ppo", "name": "big", "settings": settings | ppo, "providers": {"rlhf": ours}}
    broken = row | {"name": "too big", "providers": {}, "failed": {"rlhf": "out of memory"}}
    written(
        tmp_path, "t.json", [row, alone, broken], command="python -m benchmarks.trainer", trl={"dpo": {"trl": "1.2"}}
    )
    text = "\n\n".join(readme.trainers(readme.read(tmp_path), "cpu"))
    link, model = "(benchmarks/results/t.json)", "Llama of width 128, 4 layers"
    of_ppo = f"8 prompts of 5 tokens, 9 new; 1 epoch; {model}", "0.500", "", "", "1.00", "gradient 0.400, rest 0.100"
    of_dpo = f"4 pairs of 20 to 1,000 tokens; {model}", "0.500", "2.00", "4.00x", "1.00, 3.00"
    of_phases = "gradient 0.400 (1.50), rest 0.100 (0.500)"
    assert rows(text, "[") == [[f"[PPO, big]{link}", *of_ppo], [f"[DPO, vocabulary 512]{link}", *of_dpo, of_phases]]
    assert "TRL 1.2 for DPO" in text and "`python -m benchmarks.trainer`" in text
