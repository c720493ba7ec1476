"""Measure models: python eval/measure.py NAME --model DIR [DIR2 ...] and the measure's own options.

    python eval/measure.py perplexity --model DIR --text fo=FILE da=FILE    # bits a byte of several languages
    python eval/measure.py minimal_pairs --model DIR --text FILE            # right and wrong sentences
    python eval/measure.py translate --model DIR                            # FLORES-200: chrF++, BLEU
    python eval/measure.py open_questions --model DIR --data FILE           # sampled answers, right by a pattern
    python eval/measure.py NAME --help                                      # what a measure does, and its options

Prints a table, and writes one result file a model (configs/io/results.py): runs/NAME/eval/, or for a model outside of
any run RUNS_DIR/models/NAME-HASH/eval/. eval/compare.py puts models side by side, with paired intervals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

if not __package__:  # started as a script: the repository first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.checks import check_ranges
from configs.io.results import Result, Value
from configs.schema import RunConfig
from eval.cli import exit_code, parser_of
from eval.measures.model import Model, check_model

FILES = {"minimal_pairs": "pairs.json"}
"""Result files that are not called after their measure: a run keeps its own minimal_pairs.json."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    from eval.measures import MEASURES

    parser = parser_of(__doc__, runs_dir=False)
    commands = parser.add_subparsers(dest="measure", required=True, metavar="NAME", title="measures")
    for name, measure in MEASURES.items():
        text = sys.modules[measure.__module__].__doc__ or ""
        command = commands.add_parser(
            name,
            description=text,
            help=text.split("\n")[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--model", required=True, nargs="+", help="model directories, adapters or hub ids")
        command.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
        command.add_argument("--runs_dir", type=Path, default=Path(RunConfig().runs_dir), help="folder of all runs")
        add_options(command, settings_of(measure))
    args = parser.parse_args(arguments)
    settings = settings_of(MEASURES[args.measure])
    return exit_code(lambda: run(args.measure, args.model, read_options(args, settings), args.dtype, args.runs_dir))


def settings_of(measure: Callable[..., Result]) -> type[Any]:
    """The dataclass that a measure's function takes."""
    found: type[Any] = get_type_hints(measure)["settings"]
    return found


def add_options(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """An option for each field of a dataclass: its name, type, default, and the docstring below it."""
    from docstring_parser import parse_from_object

    classes = [one for one in settings.__mro__ if is_dataclass(one)]
    said = {param.arg_name: param.description for one in classes for param in parse_from_object(one).params}
    hints = get_type_hints(settings)
    for one in fields(settings):
        kind, several = hints[one.name], get_origin(hints[one.name]) is tuple
        if several or get_origin(kind) in (UnionType, Union):  # tuple[X, ...], or X | None
            kind = get_args(kind)[0]
        extra: dict[str, Any] = {"type": json.loads if get_origin(kind) is dict else kind}
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            extra = {"choices": get_args(kind)}
        if several:
            extra["nargs"] = "+"
        needed = one.default is MISSING and one.default_factory is MISSING
        made = None if one.default_factory is MISSING else one.default_factory()
        default = made if one.default is MISSING else one.default
        parser.add_argument(f"--{one.name}", help=said.get(one.name), required=needed, default=default, **extra)


def read_options(args: argparse.Namespace, settings: type[Any]) -> Any:
    """The dataclass from the options of its fields. Raises ValueError for a number out of its range."""
    given = {one.name: getattr(args, one.name) for one in fields(settings)}
    found = settings(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
    check_ranges(found, "--")
    return found


def run(name: str, models: Sequence[str], settings: Any, dtype: str, runs_dir: Path) -> list[Result]:
    """Measure each model, write its result, and print them all. Raises ValueError where something is to be mended."""
    for path in models:
        check_model(path)
    from eval.measures import MEASURES

    results, files = [], []
    for path in models:
        model = Model(path=path, dtype=dtype, runs_dir=runs_dir)
        results.append(MEASURES[name](model, settings))
        files.append(model.folder / FILES.get(name, f"{name}.json"))
        results[-1].write(files[-1])
    print(table(results))
    for file in files:
        print(f"written: {file}")
    return results


def table(results: Sequence[Result]) -> str:
    """A line for each value, a column for each model."""
    import pandas

    columns = {one.model: {key: show(value) for key, value in one.values.items()} for one in results}
    return str(pandas.DataFrame(columns).fillna("").to_string())


def show(value: Value) -> str:
    """The value with its 95 % interval."""
    if value.low is None or value.high is None:
        return f"{value.value:.4g}"
    return f"{value.value:.4g} ({value.low:.4g} to {value.high:.4g})"


if __name__ == "__main__":
    sys.exit(main())
