"""The runner goes on, measures once, leaves at a signal; its tables are those worked out by hand."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from configs.io.results import Result, Value
from eval.compare import main as compare
from eval.experiments.plan import Plan, Task, models_of, read_plan
from eval.experiments.table import draw, main_table, page, paired, paired_table, read_table
from eval.run_experiment import Runner, array_task, is_finished, main, parse_arguments
from tests.support.runs import ROOT, TINY, environment
from tests.support.teacher_servers import wait_until_gone

ABLATION = read_plan(ROOT / "configs" / "ablation.yaml")


@pytest.fixture(scope="module")
def small_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ablation with two of its variants and one that cannot be."""
    path = tmp_path_factory.mktemp("plan") / "small.yaml"
    values = yaml.safe_load((ROOT / "configs" / "ablation.yaml").read_text())
    broken = {"name": "broken", "group": "parts", "what": "cannot be", "settings": {"sampling.teacher_mix": 2.0}}
    kept = [one for one in values["variants"] if one["name"] in ("grpo-minillm", "seqkd")]
    common = {"steps": 2, "teacher.tensor_parallel": 1}
    path.write_text(
        yaml.safe_dump(
            {**values, "seeds": [0], "whole": "", "common": common, "variants": [broken, *kept]}, sort_keys=False
        )
    )
    return path


def line(plan: Path, runs: Path, cache: Path, *more: str) -> list[str]:
    """The command as a user types it, on the tiny demo."""
    where = ["--runs_dir", str(runs), "--cache_dir", str(cache)]
    return [sys.executable, "eval/run_experiment.py", str(plan), *where, *more, *TINY]


def drive(words: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=ROOT, env=environment() | env, capture_output=True, text=True, timeout=900, check=False
    )


def test_failures_are_named_the_others_go_on_and_nothing_is_done_twice(
    small_plan: Path, demo_cache: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    done = drive(line(small_plan, runs, demo_cache, "--jobs", "2"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 runs, 0 finished already" in done.stdout
    assert "failed: broken-seed0, exit code 2" in done.stderr
    assert "teacher_mix" in done.stderr
    table = (runs / "results.md").read_text()
    assert "| `grpo-minillm` |" in table
    assert "| `seqkd` |" in table
    assert "`broken`" not in table
    assert (runs / "results.png").read_bytes().startswith(b"\x89PNG")
    row = next(row for row in table.splitlines() if row.startswith("| `grpo-minillm` | "))
    assert "–" not in row, "every column has its number"

    assert compare(["--runs_dir", str(runs), "--run", str(runs / "grpo-minillm-seed0"), str(runs / "seqkd-seed0")]) == 0
    assert re.search(r"After seqkd-seed0, change.*\[", (runs / "grpo-minillm-seed0" / "compare.md").read_text())

    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.suffix in (".json", ".log")}
    again = drive(line(small_plan, runs, demo_cache, "--only", "grpo-minillm", "seqkd"))
    assert again.returncode == 0, again.stderr
    assert "2 runs, 2 finished already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.suffix in (".json", ".log")} == before
    assert (runs / "results.md").read_text() == table
    # Other steps than were asked for are no result of this experiment.
    fewer = drive(line(small_plan, runs, demo_cache, "--only", "grpo-minillm", "--steps", "1"))
    assert fewer.returncode == 2
    assert "has done 2 steps, 1 are asked for; use another --runs_dir" in fewer.stderr
    os.utime(runs / "grpo-minillm-seed0" / "export" / "model.safetensors", ns=(1, 1))
    assert drive(line(small_plan, runs, demo_cache, "--only", "grpo-minillm")).returncode == 0
    assert "grpo-minillm-seed0" in (runs / "logs" / "measure-language.log").read_text().split("written:")[-1]


def test_a_task_of_an_array_does_its_run_only(small_plan: Path, tmp_path: Path) -> None:
    words = line(small_plan, tmp_path / "runs", tmp_path / "cache")
    done = drive(words, SLURM_ARRAY_TASK_ID="0")
    assert done.returncode == 1
    assert "1 runs, 0 finished already" in done.stdout
    assert "broken-seed0" in done.stderr
    assert not (tmp_path / "runs" / "results.md").exists()
    assert drive(words, SLURM_ARRAY_TASK_ID="3").returncode == 2
    tasks = [Task(variant, seed) for seed in ABLATION.seeds for variant in ABLATION.variants]
    assert array_task(tasks, None) == tasks
    assert [array_task(tasks, str(i))[0] for i in range(len(tasks))] == tasks


def test_a_signal_ends_the_runs_and_leaves(small_plan: Path, demo_cache: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = line(small_plan, runs, demo_cache, "--only", "grpo-minillm", "--steps", "100000")
    process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 400
        while not (runs / "grpo-minillm-seed0" / "metrics.jsonl").is_file():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 75
    assert b"run the same command again to continue" in said
    assert (runs / "grpo-minillm-seed0" / "checkpoints" / "latest").is_file(), "the trainer left with a checkpoint"
    assert not (runs / "results.md").exists()
    wait_until_gone(str(runs), 5.0)  # no child is left behind


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = str(ROOT / "configs" / "miniature.yaml")
    for words, message in (
        ([plan], "${text}: give --with text=VALUE"),
        ([plan, "--with", "models"], "--with models: give NAME=VALUE"),
        ([plan, "--jobs", "0"], "--jobs = 0"),
        ([str(tmp_path / "none.yaml")], "not the plan of an experiment"),
    ):
        assert main([*words, "--runs_dir", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ({"perplexty": {"text": "a"}}, "measures: 'perplexty': no such measure; there are perplexity, "),
        ({"perplexity": {"text": "a", "batches": 3}}, "perplexity: no option 'batches'; there are dtype, text, batch"),
        ({"language": {"text": "a"}}, "measures: language needs words"),
        ({"language": None}, "measures: language needs text, words"),
        ({"perplexity": {"text": "${data.txt}"}}, "${data.txt}: give --with data.txt=VALUE"),
    ],
)
def test_mistakes_below_measures_are_named_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], measures: dict[str, Any], message: str
) -> None:
    plan = tmp_path / "plan.yaml"
    variants = [{"name": "a", "what": "w", "settings": {}}]
    plan.write_text(yaml.safe_dump({"seeds": [0], "columns": {}, "variants": variants, "measures": measures}))
    assert main([str(plan), "--runs_dir", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_every_file_of_prepare_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of two that differ in their suffix alone."""
    plan, started = tmp_path / "plan.yaml", []
    made = {f"${{runs}}/text.{suffix}": ["a.py", suffix] for suffix in ("jsonl", "csv")}
    variants = [{"name": "a", "what": "w", "settings": {}}]
    plan.write_text(yaml.safe_dump({"seeds": [0], "columns": {}, "variants": variants, "prepare": made}))
    monkeypatch.setattr(Runner, "run", lambda self, commands: started.append(list(commands.values())))
    assert main([str(plan), "--runs_dir", str(tmp_path / "runs")]) == 1
    assert started == [[["a.py", "csv"], ["a.py", "jsonl"]]]  # in YAML's order; no run where they are not made


# --- the tables ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Three variants, two seeds, two columns."""
    path = tmp_path / "plan.yaml"
    columns = {
        "f1": {"title": "F1", "digits": 1, "better": "higher"},
        "fo/bits_per_byte": {"title": "bits", "digits": 3, "better": "lower"},
    }
    variants = [
        {"name": "grpo-minillm", "group": "parts", "what": "all", "settings": {}},
        {"name": "no-pt", "group": "parts", "what": "less", "settings": {}},
        {"name": "seqkd", "group": "baselines", "what": "supervised", "settings": {}},
    ]
    values = {"seeds": [0, 1], "columns": columns, "variants": variants, "whole": "grpo-minillm",
              "groups": {"parts": "Parts", "baselines": "Baselines"},
              "measures": {"perplexity": {"text": "t"}}}  # fmt: skip
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return read_plan(path)


def measured(folder: Path, bits: float) -> None:
    values = {"fo/bits_per_byte": Value(bits)}
    folder.mkdir(parents=True, exist_ok=True)
    Result(measure="perplexity", model="m", data={}, settings={}, versions={}, values=values).write(
        folder / "perplexity.json"
    )


def made_up_run(runs: Path, name: str, f1: float, bits: float, tokens: int = 30_000, status: str = "finished") -> None:
    """A run folder without a model in it."""
    run = runs / name
    measured(run / "eval", bits)
    (run / "config.yaml").write_text(yaml.safe_dump({"student": {"path": "student"}, "teacher": {"path": "teacher"}}))
    summary: dict[str, Any] = {
        "status": status, "steps": 10, "seconds": {"total": 60.0}, "tokens": {"sampled": tokens},
        "eval_before": {"f1": 20.0}, "eval_after": {"f1": f1}, "teacher_eval": {"f1": 80.0},
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def runs(tmp_path: Path, plan: Plan) -> Path:
    from eval.measures.model import output_folder

    made_up_run(tmp_path, "grpo-minillm-seed0", 50.0, 0.5)
    made_up_run(tmp_path, "grpo-minillm-seed1", 54.0, 0.7)
    made_up_run(tmp_path, "no-pt-seed0", 49.0, 1.5)
    made_up_run(tmp_path, "no-pt-seed1", 55.0, 1.9)
    made_up_run(tmp_path, "seqkd-seed0", 40.0, 1.1, tokens=4_000)
    made_up_run(tmp_path, "seqkd-seed1", 99.0, 0.9, status="stopped")
    measured(output_folder("student", tmp_path), 1.0)
    return tmp_path


def test_tables_are_those_worked_out_by_hand(plan: Plan, runs: Path) -> None:
    table = read_table(plan, [Task(variant, seed) for variant in plan.variants for seed in (0, 1)], runs)
    assert len(table) == 5 * 3  # the stopped one does not count
    assert main_table(plan, table) == [
        "| variant | F1 | change | bits | change | tokens (k) | seconds |",
        "| --- |" + " ---: |" * 6,
        "| *start* | 20.0 |  | 1.000 |  |  |  |",
        "| *teacher* | 80.0 |  | – |  |  |  |",  # not measured
        "| **Parts** |" + " |" * 6,
        # (50, 54): mean 52, deviation 4/sqrt 2; (0.5, 0.7) likewise
        "| `grpo-minillm` | 52.0 ± 2.8 | +32.0 ± 2.8 | 0.600 ± 0.141 | -0.400 ± 0.141 | 30 | 60 |",
        "| `no-pt` | 52.0 ± 4.2 | +32.0 ± 4.2 | 1.700 ± 0.283 | +0.700 ± 0.283 | 30 | 60 |",
        "| **Baselines** |" + " |" * 6,
        "| `seqkd` | 40.0 | +20.0 | 1.100 | +0.100 | 4 | 60 |",
    ]
    assert paired_table(plan, table) == [
        "| against `grpo-minillm` | F1 | bits |",
        "| --- |" + " ---: |" * 2,
        # F1: -1 and +1; bits 1.0 and 1.2: half-widths t(0.975, 1 degree of freedom) = 12.706 times 1 and 0.1
        "| `no-pt` | +0.0 [-12.7, +12.7] | +1.100 [-0.171, +2.371] |",
        "| `seqkd` | -10.0 | +0.600 |",
    ]
    text = page(plan, table, ["seqkd-seed1"])
    assert "95 % interval" in text
    # 1, 2, 3: t(0.975, 2) = 4.3027 times 1 / sqrt 3
    assert paired(pandas.Series([1.0, 2.0, 3.0]), 2) == "+2.00 [-0.48, +4.48]"
    assert paired(pandas.Series([1.0, 1.1, 1.2]), 2) == "+1.10 [+0.85, +1.35] *"
    assert "Not finished, so not in the tables: seqkd-seed1." in text
    picture = draw(plan, table)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 200_000


def with_evaluation(run: Path, **found: Any) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | found))


def test_a_start_counts_once_for_each_seed(plan: Plan, runs: Path) -> None:
    """Also where two seeds sampled the same share of right answers by chance."""
    made_up_run(runs, "grpo-minillm-seed2", 54.0, 0.7)
    for seed, f1 in enumerate((78.0, 78.0, 81.0)):
        with_evaluation(runs / f"grpo-minillm-seed{seed}", eval_before={"f1": f1})
    table = read_table(plan, [Task(plan.variants[0], seed) for seed in range(3)], runs)
    # 78, 78, 81: mean 79, deviation sqrt(3); the bits are measured once, and have none.
    assert main_table(plan, table)[2] == "| *start* | 79.0 ± 1.7 |  | 1.000 |  |  |  |"


def test_several_teachers_have_a_row_each(plan: Plan, runs: Path) -> None:
    large = runs / "seqkd-seed0"
    config = yaml.safe_load((large / "config.yaml").read_text())
    (large / "config.yaml").write_text(yaml.safe_dump(config | {"teacher": {"path": "models/large"}}))
    with_evaluation(large, teacher_eval={"f1": 90.0})
    lines = main_table(plan, read_table(plan, [Task(variant, 0) for variant in plan.variants], runs))
    assert lines[3:5] == ["| *teacher teacher* | 80.0 |  | – |  |  |  |", "| *teacher large* | 90.0 |  | – |  |  |  |"]


def test_a_relative_path_is_from_the_repository_in_a_run_and_from_here_on_the_command_line(
    plan: Plan, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs are started in the repository, wherever the experiment is."""
    from eval.experiments import plan as module
    from eval.measures.model import output_folder

    repository, here = tmp_path / "repository", tmp_path / "here"
    for folder in (repository / "student", here / "models" / "own"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", repository)
    monkeypatch.chdir(here)
    measured(output_folder(repository / "student", runs), 2.0)
    table = read_table(plan, [Task(plan.variants[0], 0)], runs)
    assert table[table.stage == "start"]["fo/bits_per_byte"].tolist() == [2.0]
    assert models_of(runs / "no-pt-seed0")["teacher"] == "teacher", "not there: a hub id"
    _, more = parse_arguments(["plan.yaml", "--student.path", "models/own", "--teacher.path=models/own", "--x", "a/b"])
    own = str(here / "models" / "own")
    assert more == ["--student.path", own, f"--teacher.path={own}", "--x", "a/b"]


def test_which_runs_are_finished(runs: Path) -> None:
    """All steps, or ended by a limit of the run's own; not what was stopped, nor what is not there."""
    run = runs / "grpo-minillm-seed0"
    assert is_finished(run, 10)
    assert is_finished(run, None)
    assert not is_finished(run, 11)
    assert not is_finished(runs / "seqkd-seed1", 10)
    assert not is_finished(runs / "nothing", 1)
    with pytest.raises(ValueError, match="has done 10 steps, 9 are asked for"):
        is_finished(run, 9)
    summary = json.loads((run / "summary.json").read_text())
    for over in ({"kl_limit_reached": True}, {"validation": {"stopped_early": True}}):
        (run / "summary.json").write_text(json.dumps(summary | over))
        assert is_finished(run, 11)
