"""The command line: precedence, hints, exit codes, one line for a mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import yaml
from conftest import ROOT
from tiny_models import write_jsonl

from rlhf import config as configs
from rlhf.cli import COMMANDS, main, parse_config
from rlhf.config import GenerateConfig, PPOConfig, SFTConfig, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
PPO = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--reward", "a:b"]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def fails(capsys, *arguments: str) -> str:
    """The one line of a command that exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    told = [line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line]
    assert stop.value.code == 2 and len(told) == 1 and told[0].startswith("rlhf "), told
    return told[0]


def test_yaml_overrides_defaults_and_the_command_line_overrides_yaml(yaml_file):
    path = yaml_file("model_name_or_path: m\ndataset_name: d\noutput_dir: o\nlearning_rate: 1e-4\nseed: 7\n")
    for arguments in (["--config", path, "--seed", "9"], ["--seed", "9", "--config", path]):
        config = parse_config("sft", SFTConfig, arguments)
        assert config == SFTConfig(model_name_or_path="m", dataset_name="d", output_dir="o", learning_rate=1e-4, seed=9)


def test_lists_nulls_and_switches(yaml_file):
    config = parse_config("ppo", PPOConfig, [*PPO, "c:d", "--missing_eos_penalty", "null", "--whiten_rewards", "true"])
    assert (config.reward, config.missing_eos_penalty, config.whiten_rewards) == (["a:b", "c:d"], None, True)
    path = yaml_file("reward: [a:b, c:d]\nmissing_eos_penalty: null\n")
    assert parse_config("ppo", PPOConfig, ["--config", path, *PPO[:6]]).reward == ["a:b", "c:d"]
    path = yaml_file("reward: a:b, [c]  # one\nreward_weights: 0.5\n")
    config = parse_config("ppo", PPOConfig, [f"--config={path}", *PPO[:6]])
    assert (config.reward, config.reward_weights) == (["a:b, [c]"], [0.5])


def test_a_lone_value_of_a_list_may_be_written_in_any_way(yaml_file):
    text = "model_name_or_path: &m models/a\nprompt: |\n  the film\nseed: 3\n"
    config = parse_config("generate", GenerateConfig, ["--config", yaml_file(text)])
    assert (config.prompt, config.seed) == (["the film\n"], 3)
    for text, prompt in (
        ("*m", "models/a"),
        ("&p '1'", "1"),
        ("!!str 5", "5"),
        (">-\n  a\n  b", "a b"),
        ("1e-5", "1e-5"),
    ):
        path = yaml_file(f"model_name_or_path: &m models/a\nprompt: {text}\nseed: 3\n")
        assert parse_config("generate", GenerateConfig, ["--config", path]).prompt == [prompt]


def test_a_saved_configuration_is_one_to_start_from(yaml_file):
    config = parse_config("ppo", PPOConfig, [*PPO, "--score_clip", "3", "--missing_eos_penalty", "null"])
    assert parse_config("ppo", PPOConfig, ["--config", yaml_file(yaml.safe_dump(asdict(config)))]) == config


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--learning_rat", "1"], "learning_rat 1, did you mean 'learning_rate'?"),
        (["--learning-rate", "1"], "did you mean 'learning_rate'?"),
        (["--learning_rate", "fast"], "learning_rate: expected float, got fast"),
        (["--lr_scheduler_type", "step"], "expected Literal['linear', 'cosine', 'constant'], got step"),
        (["--score_clip", "x"], "score_clip: expected one of float, null, got x"),
        (["--gamma", "2"], "gamma: expected a number in [0, 1], got 2.0"),
        (["--config", "absent.yaml"], "absent.yaml: cannot be read"),
    ],
)
def test_a_wrong_option_is_one_line_that_helps(capsys, arguments, line):
    assert line in fails(capsys, "ppo", *PPO, *arguments)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nlearnig_rate: 1e-4\n", "config.yaml:2: no field 'learnig_rate', did you mean 'learning_rate'?"),
        ("seed: 1\ngamma: 1\nseed: 2\n", "config.yaml:3: seed stands twice"),
        ("- seed\n", "config.yaml: expected lines of `field: value`"),
        ("", "config.yaml: expected lines of `field: value`"),
        ("seed: [1\n", "config.yaml: not YAML"),
        ("lora_target_modules:\nseed: 1\n", "lora_target_modules: expected list[str], got None"),
        ("? [seed]\n: 1\n", "config.yaml:1: expected the name of a field before the colon"),
        ("learning_rate: null\n", "learning_rate: expected float, got None"),
        ("seed: many\n", "seed: expected int, got many"),
    ],
)
def test_a_wrong_file_is_one_line_that_helps(capsys, yaml_file, text, line):
    assert line in fails(capsys, "ppo", "--config", yaml_file(text), *PPO)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_configurations_are_valid(path):
    """configs/<size>_<command>.yaml, which leaves the data to the user."""
    command = path.stem.rpartition("_")[2]
    cls = getattr(configs, COMMANDS[command][1])
    config = parse_config(command, cls, ["--config", str(path), "--dataset_name", "rows.jsonl"])
    assert (
        config.dataset_name == ["rows.jsonl"] and config.output_dir == f"runs/{path.stem.rpartition('_')[0]}/{command}"
    )


def test_missing_fields_and_unknown_commands(capsys):
    assert "model_name_or_path" in fails(capsys, "sft", "--output_dir", "o", "--dataset_name", "d")
    assert "no command 'pppo', did you mean 'ppo'?" in fails(capsys, "pppo")


def test_data_and_model_errors_are_one_line(capsys, tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the", "completion": "film"}\n{"prompt": \n')
    common = ["--output_dir", str(tmp_path / "out"), "--device", "cpu", "--max_length", "16", "--model_name_or_path"]
    rows = ["--dataset_name", str(tmp_path / "rows.jsonl")]
    assert f"{tmp_path}/rows.jsonl:2: not valid JSON" in fails(capsys, "sft", *common, tiny_model, *rows)
    assert "absent.jsonl: no such file" in fails(capsys, "sft", *common, tiny_model, "--dataset_name", "absent.jsonl")
    assert "not a model directory" in fails(capsys, "sft", *common, str(tmp_path), *rows)
    ppo = ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", tiny_model, *rows]
    told = fails(capsys, "ppo", *ppo, "--reward", "nowhere:f")
    assert "reward nowhere:f: ModuleNotFoundError: No module named 'nowhere'" in told


def test_models_and_data_that_do_not_fit_are_one_line(capsys, tiny_model, tiny_reward_model, tmp_path):
    from transformers import AutoTokenizer

    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "the", "chosen": " new", "rejected": " film"}] * 4)
    rows = ["--dataset_name", rows, "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    short = shutil.copytree(tiny_reward_model, tmp_path / "short")
    settings = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 12}
    (short / "config.json").write_text(json.dumps(settings))
    ppo = ["--model_name_or_path", tiny_model, "--reward_model_path", str(short), "--response_length", "12"]
    assert f"13 tokens are more than the 12 positions of {short}" in fails(capsys, "ppo", *rows, *ppo)

    grown = shutil.copytree(tiny_model, tmp_path / "grown")
    tokenizer = AutoTokenizer.from_pretrained(grown)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(grown)
    reward = ["--model_name_or_path", str(grown), "--max_length", "16"]
    assert "rows.jsonl:1: the model's embedding of" in fails(capsys, "reward", *rows, *reward)


def test_a_directory_that_cannot_be_made_is_one_line(capsys, tmp_path, corpus, tiny_model):
    (tmp_path / "file").touch()
    model = ["--model_name_or_path", tiny_model, "--dataset_name", corpus, "--max_length", "16"]
    told = fails(capsys, "sft", *model, "--output_dir", str(tmp_path / "file" / "run"))
    assert "output_dir: cannot be made" in told


def test_print_config_gives_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ppo", *PPO, "--seed", "5", "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert stop.value.code == 0
    assert shown["seed"] == 5 and shown["reward"] == ["a:b"] and shown["kl_target"] is None


@pytest.mark.parametrize("arguments", [["--help"], ["ppo", "--help"]])
def test_help_is_quick_and_needs_no_torch(arguments):
    code = "import sys; from rlhf.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    since = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 0 and time.perf_counter() - since < 1.0
    names = COMMANDS if len(arguments) == 1 else ["--kl_coef", "Weight of the per-token KL penalty"]
    assert all(name in run.stdout for name in names)


def test_env_names_versions_and_kernels(capsys):
    main(["env"])
    told = capsys.readouterr().out
    assert all(name in told for name in ("torch", "transformers", "rlhf_kernels", "token_logprobs", "ppo_loss"))


def test_init_sft_and_generate_by_command(capsys, corpus, tmp_path):
    model, run, out = (str(tmp_path / name) for name in ("model", "run", "samples"))
    small = ["--hidden_size", "32", "--num_hidden_layers", "1", "--tokenizer", "word"]
    main(["init", "--dataset_name", corpus, "--output_dir", model, *small])
    main(["sft", "--model_name_or_path", model, "--dataset_name", corpus, "--output_dir", run, "--max_steps", "2"])
    sampling = ["--max_new_tokens", "5", "--num_return_sequences", "2", "--num_prompts", "3"]
    final = f"{run}/final"
    main(["generate", "--model_name_or_path", final, "--dataset_name", corpus, "--output_dir", out, *sampling])
    rows = [json.loads(line) for line in (tmp_path / "samples" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[0]["prompt"] == rows[1]["prompt"] != rows[2]["prompt"]
    main(["generate", "--model_name_or_path", final, "--prompt", "the film", "--output_dir", out, "--temperature", "0"])
    rows = [json.loads(line) for line in (tmp_path / "samples" / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the film"] and "the film" in capsys.readouterr().out


def test_generate_refuses_the_directory_of_a_run_and_a_dataset_of_no_rows(capsys, tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    common = ["--model_name_or_path", tiny_model, "--output_dir", str(tmp_path)]
    told = fails(capsys, "generate", *common, "--dataset_name", str(tmp_path / "rows.jsonl"))
    assert told.endswith("rows.jsonl: no usable row")
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n')
    assert "holds a training run: use another output_dir" in fails(capsys, "generate", *common, "--prompt", "the")
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 1}\n'


def test_an_unknown_option_raises_before_anything_runs():
    with pytest.raises(UsageError, match="nonsense"):
        parse_config("ppo", PPOConfig, [*PPO, "--nonsense", "1"])
