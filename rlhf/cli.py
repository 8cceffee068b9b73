"""`rlhf COMMAND --config file.yaml --field value`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import math
import os
import re
import sys
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from rlhf import config as configs
from rlhf.config import ConfigError, TrainingDiverged, UsageError

COMMANDS = {  # name: what it does, its configuration, what runs it
    "init": ("train a tokenizer on a corpus and build a model from a configuration", "InitConfig", "rlhf.init:init"),
    "sft": ("fine-tune on text, prompt and completion, or messages", "SFTConfig", "rlhf.sft:train"),
    "reward": ("train a reward model on pairs, rankings or judged steps", "RewardConfig", "rlhf.reward_model:train"),
    "dpo": ("optimise a policy on preferences, without a reward model", "DPOConfig", "rlhf.dpo:train"),
    "ppo": ("optimise a policy against reward models and reward functions", "PPOConfig", "rlhf.ppo:train"),
    "generate": ("sample from a model", "GenerateConfig", "rlhf.generate:main"),
    "eval": ("measure models on held-out data: loss, accuracy, win-rate, best-of-n", "EvalConfig", "rlhf.eval:main"),
    "demo": ("run the whole pipeline on a task with a known gold reward", "DemoConfig", "rlhf.study:main"),
    "env": ("print versions, devices and kernels, for a bug report", "EnvConfig", "rlhf.env:main"),
}
NULL = "tag:yaml.org,2002:null"


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0 if arguments else 2)
    command, *rest = arguments
    if command not in COMMANDS:
        raise SystemExit(_complain(f"no command {command!r}{_nearest(command, COMMANDS)}: see rlhf --help"))
    _, config_name, runner = COMMANDS[command]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its load reports tell what this trainer does on purpose
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        config = parse_config(command, getattr(configs, config_name), rest)
        if getattr(config, "dry_run", False):
            runner = "rlhf.memory:main"
        module, _, function = runner.partition(":")
        getattr(importlib.import_module(module), function)(config)
    except UsageError as error:
        raise SystemExit(_complain(f"{command}: {error}")) from None
    except TrainingDiverged as error:
        _complain(f"{command}: {error}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (text, *_) in COMMANDS.items()]
    head = "usage: rlhf COMMAND [--config FILE.yaml] [--field VALUE ...]"
    return "\n".join([head, "", *lines, "", "rlhf COMMAND --help lists its fields; --print_config prints the values."])


def parse_config(command: str, cls: type, arguments: list[str]):
    """The dataclass from defaults, then YAML, then the command line. Exits with status 2 and one line on a mistake."""
    parser = build_parser(command, cls)
    values = parser.parse_args(_with_files_read(arguments, cls)).as_dict()
    return cls(**{field.name: values[field.name] for field in fields(cls)})


def build_parser(command: str, cls: type):
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> None:
            raise UsageError(_plain(" ".join(message.split()), [field.name for field in fields(cls)]))

    parser = Parser(prog=f"rlhf {command}", description=COMMANDS[command][0], allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="YAML file of the fields below; the command line goes before it."
    )
    hints, texts = get_type_hints(cls), field_help(cls)
    for field in fields(cls):
        required = field.default is MISSING and field.default_factory is MISSING
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        options = {"required": True} if required else {"default": default}
        kind = hints[field.name]
        options |= {"nargs": "+", "type": get_args(kind)[0]} if get_origin(kind) is list else {"type": kind}
        options |= {"nargs": "?", "const": True} if kind is bool else {}  # --dry_run alone is --dry_run true
        parser.add_argument(f"--{field.name}", help=texts[field.name], **options)
    return parser


def field_help(cls: type) -> dict[str, str]:
    """The sentence under each field, a subclass's before its base's."""
    texts = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for statement, below in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[statement.target.id] = below.value.value
    return texts


def read_yaml(path: str, cls: type) -> str:
    """The file's fields, one value of a list as a list of one. Refuses what the parser takes silently or without a
    hint: duplicate keys, unknown keys, no mapping at all."""
    import yaml

    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected lines of `field: value`")
    hints, names, seen = get_type_hints(cls), [field.name for field in fields(cls)], set()
    for number, (key, value) in enumerate(node.value):
        where = f"{path}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}: expected the name of a field before the colon")
        if key.value in seen:
            raise ConfigError(f"{where}: {key.value} stands twice")
        if key.value not in names:
            raise ConfigError(f"{where}: no field {key.value!r}{_nearest(key.value, names)}")
        if get_origin(hints[key.value]) is list and isinstance(value, yaml.ScalarNode) and value.tag != NULL:
            quoted = '"' if value.tag.endswith(":str") else value.style  # 1e-5, too, stays the text that YAML calls it
            entry = yaml.ScalarNode(value.tag, value.value, style=quoted)
            node.value[number] = key, yaml.SequenceNode("tag:yaml.org,2002:seq", [entry])
        seen.add(key.value)
    return yaml.serialize(node, Dumper=yaml.SafeDumper, width=math.inf, allow_unicode=True)


def _with_files_read(arguments: list[str], cls: type) -> list[str]:
    """The parser takes the text of a YAML file in place of its name, and lets what comes later win: files go first."""
    files, rest, before = [], [], ""
    for argument in arguments:
        if before == "--config":
            files += [rest.pop(), read_yaml(argument, cls)]
        elif argument.startswith("--config="):
            files += ["--config", read_yaml(argument.partition("=")[2], cls)]
        else:
            rest.append(argument)
        before = argument
    return files + rest


def _plain(message: str, names: list[str]) -> str:
    """The parser's message in the words of our own, with the nearest name where one is unknown."""
    message = re.sub(
        r'Parser key "(\w+)"(?: element \d+)?: Expected an? (.*)\. Got value: (.*)', r"\1: expected \2, got \3", message
    )
    union = r'Parser key "(\w+)": Does not validate .* Subtypes: \[(.*?)\] .*Given value: (.*)'
    message = re.sub(union, r"\1: expected one of \2, got \3", message).replace("NoneType", "null")
    message = re.sub(r"<class '(\w+)'>|typing\.(?=Literal)", r"\1", message)
    for option in re.findall(r"--([\w-]+)", message):
        if option not in names and (hint := _nearest(option.replace("-", "_"), names)):
            return message + hint
    return message


def _nearest(word: str, names) -> str:
    close = difflib.get_close_matches(word, names, 1)
    return f", did you mean {close[0]!r}?" if close else ""


def _complain(line: str) -> int:
    print(f"rlhf {line}", file=sys.stderr)
    return 2
