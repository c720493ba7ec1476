"""From the command line to a RunConfig: defaults < YAML < flags; unknown keys and bad values end with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import jsonargparse
import yaml

from configs.schema import RunConfig
from training.distributed import environment_rank

ROOT = Path(__file__).resolve().parent.parent
DEMO_CONFIGS = ROOT / "configs" / "demo"


def fail(message: str) -> NoReturn:
    """End with exit code 2 and one readable message, from one rank only."""
    if environment_rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one message without the usage page."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(" ".join(message.split()) + " (--help lists every key)")


def make_parser(description: str, tools: Mapping[str, str] | None = None) -> jsonargparse.ArgumentParser:
    """A parser for every field of RunConfig, with `--config FILE` and dotted overrides.

    `tools`: flags without a value that do something else in place of the run, with their help.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(description=description, default_env=False)
    for flag, text in (tools or {}).items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def parse(
    argv: Sequence[str],
    description: str,
    default_config: Callable[[RunConfig], Path],
    tools: Mapping[str, str] | None = None,
) -> RunConfig:
    """Read `argv`. Without `--config`, `default_config` names the YAML for the algorithm and reward asked for.

    `tools`: see `make_parser`; which of them were asked for is the caller's to see in `argv`.
    """
    arguments = [a for a in argv if not a.startswith("--local_rank")]  # the launcher's own
    parser = make_parser(description, tools)
    if not any(a == "--config" or a.startswith("--config=") for a in arguments):
        asked = instantiate(parser, arguments)
        arguments = ["--config", str(default_config(asked)), *arguments]
    return instantiate(parser, arguments)


def instantiate(parser: jsonargparse.ArgumentParser, arguments: Sequence[str]) -> RunConfig:
    """Parse and build the frozen dataclasses."""
    values = parser.instantiate_classes(parser.parse_args(list(arguments)))
    fields = {k: v for k, v in vars(values).items() if k in RunConfig.__dataclass_fields__}
    return RunConfig(**fields)


def demo_config(config: RunConfig) -> Path:
    """The demo's YAML for the pair of algorithm and reward."""
    return DEMO_CONFIGS / f"{config.algo}_{config.reward}.yaml"


def load_config(path: Path) -> RunConfig:
    """A RunConfig from a YAML file alone."""
    return instantiate(make_parser("load"), ["--config", str(path)])


def dump_config(values: dict[str, object]) -> str:
    """YAML text of a resolved configuration."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
