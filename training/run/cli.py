"""From the command line to a RunConfig: defaults < YAML < flags; unknown keys and bad values end with exit code 2."""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import jsonargparse
import yaml

from configs.checks import validate
from configs.io.files import read_yaml
from configs.models import DEMO, DEMO_STAGE1
from configs.schema import RunConfig, as_dict, check_sections

ROOT = Path(__file__).resolve().parents[2]
DEMO_CONFIGS = ROOT / "configs" / "demo"
COMMON = {
    *("config", "algo", "reward", "recipe", "name", "steps", "prompts_per_step", "seed", "student.path"),
    *("student.dtype", "student.adapter.rank", "teacher.path", "teacher.dtype", "teacher.tensor_parallel"),
    *("teacher.address", "data.prompts", "data.warmup", "data.heldout", "data.text", "sampling.group_size"),
    *("sampling.max_new_tokens", "actor.learning_rate", "actor.zero_stage", "actor.micro_batch_tokens", "loss.kl_coef"),
    *("sft.steps", "sft.learning_rate", "eval.every", "checkpoint.every"),
}
"""Settings that people change: those on the page of --help."""
TOOLS = {
    "--plan": "Print how much memory the run needs on how many cards, from config.json alone, and end.",
    "--doctor": "Check that the run's numbers are right, one line a check, and end.",
    "--cluster": "With --doctor: check that the nodes of this job can work together, without any model.",
}
"""Flags that take the place of the run."""
MORE = "--help all: every setting. --print_config > my.yaml: all of them with comments, a file to start from."
UNKNOWN = re.compile(
    r"unrecognized arguments: --([\w.]+)|(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'"
)
"""How jsonargparse calls a setting that there is not."""


def fail(message: str) -> NoReturn:
    """End with exit code 2 and one readable message, from one rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def leave(code: int) -> NoReturn:
    """End the program: no library's exit hook may hang or change the code that the scheduler sees."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one message without the usage page."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        said = " ".join(message.split())
        if meant := alike(said, [action.dest for action in self._actions]):
            said += f"; did you mean {' or '.join(meant)}?"
        fail(said + " (--help all lists every key)")

    def print_page(self, *, everything: bool, epilog: str) -> NoReturn:
        """The help on the settings that people change, or on every one."""
        if not everything:
            for action in self._actions:
                if action.dest not in COMMON:
                    action.help = argparse.SUPPRESS
            groups = self._action_groups
            self._action_groups = [g for g in groups if any(a.help != argparse.SUPPRESS for a in g._group_actions)]
        self.usage, self.epilog = "%(prog)s [--config FILE] [--KEY VALUE ...]", epilog
        self.print_help()
        raise SystemExit(0)


def alike(message: str, known: Sequence[str]) -> list[str]:
    """Settings that may be meant by the unknown one of jsonargparse's message: the one of its section that is written
    most like it, or those of that name in other sections."""
    found = UNKNOWN.search(message)
    if found is None:
        return []
    key = ".".join(part for part in found.groups() if part)
    section, _, name = key.rpartition(".")
    beside = [one for one in known if one.rpartition(".")[0] == section]
    elsewhere = [one for one in known if one.rpartition(".")[2] == name]
    return (
        difflib.get_close_matches(key, beside, 1, 0.8) or elsewhere[:3] or difflib.get_close_matches(key, known, 1, 0.8)
    )


def make_parser(description: str) -> _Parser:
    """A parser for every field of RunConfig, with `--config FILE` and dotted overrides."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(description=description, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def parse(
    argv: Sequence[str],
    description: str,
    default_config: Callable[[RunConfig], Path | None],
    tools: Mapping[str, str] | None = None,
) -> RunConfig:
    """Read `argv`. Without `--config`, `default_config` names the YAML for what is asked for; None: defaults alone.

    `tools`: flags that do something else in place of the run, with their help; which of them were asked for is the
    caller's to see in `argv`.
    """
    parser = make_parser(description)
    if (flag := next((a for a in argv if a in ("-h", "--help")), None)) is not None:
        beside = [f"{name}: {text}" for name, text in (tools or {}).items()]
        parser.print_page(everything=argv[argv.index(flag) + 1 :][:1] == ["all"], epilog=" ".join([MORE, *beside]))
    # Neither the launcher's own flag nor those of the tools are settings.
    arguments = [a for a in argv if not a.startswith("--local_rank") and a not in (tools or {})]
    arguments = ["--print_config=comments" if a == "--print_config" else a for a in arguments]
    if not any(a == "--config" or a.startswith("--config=") for a in arguments):
        found = default_config(instantiate(parser, arguments))
        arguments = arguments if found is None else ["--config", str(found), *arguments]
    return instantiate(parser, arguments)


def parse_supervised(argv: Sequence[str], description: str, name: str) -> RunConfig:
    """Read and check the arguments of stage 0 or 1, for the demo with configs/demo/sft.yaml without `--config`; the run
    is called `name` unless `--name` says otherwise."""
    config = parse(argv, description, lambda asked: DEMO_CONFIGS / "sft.yaml" if is_demo(asked) else None)
    try:
        validate(config)
    except ValueError as error:
        fail(str(error))
    return replace(config, name=config.name or name)


def instantiate(parser: jsonargparse.ArgumentParser, arguments: Sequence[str]) -> RunConfig:
    """Parse and build the frozen dataclasses."""
    files = [word for flag, word in itertools.pairwise(arguments) if flag == "--config"]
    for file in files + [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]:
        try:
            content = read_yaml(Path(file))
            if not isinstance(content, Mapping):
                raise ValueError(f"{file}: no settings in it; write a line KEY: VALUE for each")
            check_sections(content, as_dict(RunConfig()))
        except ValueError as error:
            fail(str(error))
    values = parser.instantiate_classes(parser.parse_args(list(arguments)))
    fields = {k: v for k, v in vars(values).items() if k in RunConfig.__dataclass_fields__}
    return RunConfig(**fields)


def is_demo(config: RunConfig) -> bool:
    """Whether a run is the demo's, or goes on with what came of its student. The demo's settings are for models of less
    than a million parameters: their learning rate would ruin any other."""
    known = config.student.path in (DEMO, DEMO_STAGE1)
    return known or (config.teacher.path == DEMO and config.data.warmup == DEMO)


def demo_config(config: RunConfig) -> Path | None:
    """The demo's YAML for the pair of algorithm and reward, the default pair's for a pair that has none; None where the
    run is not the demo's."""
    file = DEMO_CONFIGS / f"{config.algo}_{config.reward}.yaml"
    found = file if file.is_file() else DEMO_CONFIGS / "grpo_minillm.yaml"
    return found if is_demo(config) else None


def load_config(path: Path) -> RunConfig:
    """A RunConfig from a YAML file alone."""
    return instantiate(make_parser("load"), ["--config", str(path)])


def dump_config(values: dict[str, object]) -> str:
    """YAML text of a resolved configuration."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
