"""One cluster for all tests here, and what a failing test shows of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, run
from tests.slurm.desk import FAILED, Desk


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A clear word where there is no cluster."""
    why = missing()
    for item in items:
        if why is not None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"no SLURM: {why}"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """All daemons. Not in pytest's own folder, which only its owner can enter: munge wants more."""
    with tempfile.TemporaryDirectory(prefix="grpo-kd-slurm-") as root:
        cluster = Cluster(Path(root))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, demo_cache: Path) -> Desk:
    """Where the runs of a file are."""
    return Desk(cluster, tmp_path_factory.mktemp("runs"), demo_cache)


@pytest.fixture(autouse=True)
def _look(desk: Desk, request: pytest.FixtureRequest) -> Iterator[None]:
    """When a test has failed: queue, jobs, logs. Jobs that it left are cancelled."""
    yield
    if request.node.stash.get(FAILED, False):
        print(desk.cluster.report(sorted(desk.folder.glob("*.out"))))
        run("scancel", "--user=root", check=False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Lets fixtures know that their test has failed."""
    outcome = yield
    if outcome.get_result().failed:  # type: ignore[attr-defined]
        item.stash[FAILED] = True
