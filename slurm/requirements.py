"""What pyproject.toml asks for, one requirement a line; with --check, whether this Python has all of it.

    python slurm/requirements.py run|dev|gpu [--check]

`dev` has the test tools as well; `gpu` is what tests/gpu/run.sh runs: pytest, and nothing for the measures. --check
reads package metadata only, because importing torch would take seconds; where something is missing it says what, and
the exit code is 1. slurm/env.sh chooses an environment by it.
"""

import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 (the Python that this asks may be any)
    sys.exit("Python older than 3.11")

import tomllib
from importlib.metadata import PackageNotFoundError, requires, version


def wanted(needs: str) -> list[str]:
    """The requirements, as pyproject.toml has them."""
    file = Path(__file__).resolve().parent.parent / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    dev = project["optional-dependencies"]["dev"]
    if needs == "gpu":
        measures = ("scipy", "pandas")  # a machine lent for minutes gets its wheels with it: these are 50 MB
        return [line for line in project["dependencies"] if not line.startswith(measures)] + [
            line for line in dev if line.startswith("pytest")
        ]
    return project["dependencies"] + (dev if needs == "dev" else [])


def lacking(lines: list[str]) -> str | None:
    """The first requirement that is not met, in words."""
    try:
        from packaging.requirements import Requirement  # transformers asks for it
    except ImportError:
        return "no packaging"
    needs = [Requirement(line) for line in lines]
    for need in needs:  # grows by what an extra such as jsonargparse[signatures] asks for
        try:
            have = version(need.name)
        except PackageNotFoundError:
            return f"no {need.name}"
        if not need.specifier.contains(have, prereleases=True):
            return f"{need.name} {have}, needs {need.specifier}"
        parts = map(Requirement, requires(need.name) or []) if need.extras else ()
        needs += [p for p in parts if p.marker and any(p.marker.evaluate({"extra": e}) for e in need.extras)]
    return None


if __name__ == "__main__":
    if sys.argv[2:] == ["--check"]:
        sys.exit(lacking(wanted(sys.argv[1])))  # words go to stderr, with exit code 1
    print("\n".join(wanted(sys.argv[1])))
