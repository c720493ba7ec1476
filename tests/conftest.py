"""What every test needs: few threads, no network, the repository root on the path (pyproject.toml: pythonpath)."""

from __future__ import annotations

import os

# Before torch is imported anywhere, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny demo is built once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, demo_cache: Path) -> Path:
    """A whole run of three steps on one rank: GRPO with minillm on the tiny demo."""
    from tests.runs import command, finish

    runs = tmp_path_factory.mktemp("runs")
    finish(command(runs, demo_cache, "--steps", "3", "--checkpoint.every", "2"))
    return runs / "grpo-minillm"
