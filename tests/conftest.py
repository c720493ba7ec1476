"""What every test needs: few threads, no network, the repository root on the path (pyproject.toml: pythonpath)."""

from __future__ import annotations

import os

# Before torch is imported anywhere, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# A proxy that leads outside knows nothing of the tests' own servers; bash warns of a locale that is not installed.
os.environ |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
os.environ.pop("LC_ALL", None)

import contextlib
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background deaf to it, and all that tests start and interrupt would be so too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # Under nohup as well; the tests themselves stay deaf to it, but a handler of ours is not handed on.
    signal.signal(signal.SIGHUP, lambda *_: None)

with contextlib.suppress(ImportError):  # tests/gpu does without
    from hypothesis import HealthCheck, settings

    # How long an example takes says how busy the machine is.
    settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("tests")

LONG = ("measured", "worked", "three_ranks", "demo_cache")
"""Fixtures that start whole runs, or many ranks; the last one's builder is waited for by whoever comes second."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole runs go first, so that no process is left with a long one while the others have none."""
    place: dict[Path, int] = {}
    for item in items:
        needed = [i for i, name in enumerate(LONG) if name in getattr(item, "fixturenames", ())]
        place[item.path] = min([*needed, place.get(item.path, len(LONG))])
    items.sort(key=lambda item: place[item.path])


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of a test run (pytest-xdist gives each a folder of its own below the same one);
    GRPO_KD_TESTS_SHARED names one for several runs."""
    if given := os.environ.get("GRPO_KD_TESTS_SHARED"):
        return Path(given)
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def demo_cache(shared_folder: Path) -> Path:
    """Where the tiny demo is built once for all tests; whoever needs it first builds it, the others wait."""
    cache = shared_folder / "cache"
    cache.mkdir(exist_ok=True)
    return cache


@pytest.fixture(scope="session")
def finished_run(shared_folder: Path, demo_cache: Path) -> Path:
    """A whole run of three steps on one rank: GRPO with minillm on the tiny demo."""
    from configs.io.files import locked
    from tests.support.runs import command, finish

    runs = shared_folder / "finished"
    with locked(shared_folder / "finished.lock"):
        if not (runs / "grpo-minillm" / "summary.json").is_file():
            finish(command(runs, demo_cache, "--steps", "3", "--checkpoint.every", "2"))
    return runs / "grpo-minillm"


@pytest.fixture(scope="session")
def demo_teacher(demo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Options of a run that asks the demo's teacher at one server, as all such runs of a test process do. Its secret
    is tests.support.teacher_servers.SECRET."""
    from tests.support.teacher_servers import served
    from training.data.demo.models import ensure_demo

    teacher = ensure_demo(demo_cache, size="tiny").teacher
    with served(teacher, tmp_path_factory.mktemp("teacher")) as options:
        yield options


@pytest.fixture(scope="session")
def train(demo_cache: Path, demo_teacher: tuple[str, ...]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`train(runs, *options, code=0)`: stage 2 on the tiny demo with that teacher, to its end, in a process that has
    its libraries already (tests/support/forked.py)."""
    from tests.support.forked import finish_forked
    from tests.support.runs import command
    from tests.support.teacher_servers import SECRET

    def start(runs: Path, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return finish_forked(command(runs, demo_cache, *demo_teacher, *options), code, GRPO_KD_TEACHER_SECRET=SECRET)

    return start
