"""The example of docs/python.md, as it stands, on the tiny demo, and what its numbers are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.runs import ROOT, environment

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_example_samples_scores_and_takes_a_step(tmp_path: Path, demo_cache: Path) -> None:
    """In a process of its own, as a notebook is, with checks behind the page's own lines."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20
    tiny = f'demo_size="tiny", threads=1, cache_dir={str(demo_cache)!r}, runs_dir={str(tmp_path)!r}'
    code = code.replace("RunConfig(prompts", f"RunConfig({tiny}, prompts").replace(
        "with opened(config) as run:",
        "with opened(config) as run:\n    before = [p.clone() for p in run.models.actor.policy.parameters()]",
    )
    code += """
    import torch
    own_S = rollout.behavior_logprobs_S
    total = (scored.teacher.logprobs_S - own_S).sum().item() / len(rollout.texts_B)
    assert abs(rewarded.reward.parts_B["minillm"].mean().item() - total) < 1e-4  # the mean of sum(log p_T - log pi)
    assert len(rollout.texts_B) == 16 and len(own_S) == rollout.lengths_B.sum()
    moved = [not torch.equal(p, old) for p, old in zip(run.models.actor.policy.parameters(), before)]
    assert all(moved), moved
    print("teacher", run.models.teacher.client.info().vocab_size)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("teacher ")
    assert not any(tmp_path.iterdir())  # nothing is left
