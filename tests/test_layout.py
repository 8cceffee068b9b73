"""The shape of the house: budgets of size, the order of imports, one file that touches torch.library."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT

PYTHON_LINES, NATIVE_LINES, FUNCTION_LINES, TRAIN_LINES, KERNEL_LINES = 400, 300, 60, 110, 120
NATIVE = (".cpp", ".cu", ".h", ".cuh")

# Each file of the trainer imports only from files above it.
TRAINER = (
    "config_base", "config_dpo", "config_ppo", "config_reward", "config_eval", "config", "types", "order", "files",
    "read", "chat", "rows", "tokens", "store", "data", "attention", "model", "forward", "rollout", "reward", "optim",
    "checkpoint", "track", "log", "layout", "advantages", "comparisons", "losses", "evaluation", "best_of_n", "watch",
    "sft", "bag_of_words", "reward_report", "reward_model", "reference", "dpo", "ppo", "memory", "init", "generate",
    "eval", "env", "task", "demo", "study_report", "study", "cli", "__main__",
)  # fmt: skip


def tracked(*suffixes: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    return [name for name in listed if name.endswith(suffixes) and (ROOT / name).exists()]


def code(*suffixes: str) -> list[str]:
    return [name for name in tracked(*suffixes) if not name.startswith(("tests/", "examples/"))]


def test_there_is_code_to_judge():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert len(code(".py")) > 20


@pytest.mark.parametrize("name", code(".py", *NATIVE))
def test_file_budget(name):
    lines = (ROOT / name).read_text(encoding="utf-8").count("\n")
    assert lines <= (PYTHON_LINES if name.endswith(".py") else NATIVE_LINES), (
        f"{name} has {lines} lines: split it by meaning"
    )


@pytest.mark.parametrize("name", code(".py"))
def test_function_budget(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            budget = TRAIN_LINES if node.name == "train" else KERNEL_LINES if "kernel" in node.name else FUNCTION_LINES
            lines = node.end_lineno - node.lineno + 1
            assert lines <= budget, f"{name}:{node.lineno} {node.name} has {lines} lines, budget {budget}"


def _imports(path) -> set[str]:
    """Modules that a file imports, at its top or lazily; relative ones as .name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= {f".{node.module}"} if node.module else {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "rlhf" else set()
    return found


def test_trainer_files_import_only_from_above():
    names = [path.stem for path in sorted((ROOT / "rlhf").glob("*.py")) if path.stem != "__init__"]
    assert set(names) <= set(TRAINER), f"put {set(names) - set(TRAINER)} into the order"
    for name in names:
        above = TRAINER[: TRAINER.index(name)]
        siblings = {
            m.removeprefix("rlhf").removeprefix(".")
            for m in _imports(ROOT / "rlhf" / f"{name}.py")
            if m.startswith((".", "rlhf."))
        }
        assert siblings <= set(above), f"rlhf/{name}.py imports {siblings - set(above)}, which stand below it"


def test_kernels_do_not_import_the_trainer():
    for path in (ROOT / "rlhf_kernels").rglob("*.py"):
        assert not {m for m in _imports(path) if m.split(".")[0] in ("rlhf", "transformers")}, path


def test_one_file_touches_torch_library():
    for path in (ROOT / "rlhf_kernels").rglob("*.py"):
        if path.name != "_library.py":
            uses = re.findall(r"torch\.library\.(?!opcheck)\w+", path.read_text())
            assert not uses, f"{path}: {uses}"


def test_config_is_light():
    """`rlhf --help` answers in under a second because the configuration needs neither torch nor transformers."""
    assert not {m.split(".")[0] for m in _imports(ROOT / "rlhf" / "config.py")} & {"torch", "transformers", "datasets"}


def test_readme_maps_every_file():
    """The file map of the README names each file of the packages and nothing that is not there."""
    readme = (ROOT / "README.md").read_text()
    for folder in ("rlhf", "rlhf_kernels", "rlhf_kernels/ops"):
        for path in (ROOT / folder).glob("*.py"):
            if path.name not in ("__init__.py", "__main__.py"):
                assert path.name in readme, f"README.md does not name {folder}/{path.name}"
