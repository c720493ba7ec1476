"""The ablation: its variants are valid, its driver goes on and resumes, its tables are right."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.schema import RunConfig, as_dict, validate
from eval import ablation, run_ablation
from eval.ablation_plan import Plan, Task, Variant, is_finished, read_plan
from tests.runs import ROOT, TINY, environment
from training.cli import demo_config, parse

PLAN = read_plan()
VARIANTS = {variant.name: variant for variant in PLAN.variants}


def config_of(variant: Variant) -> RunConfig:
    """The run of a variant as training/main.py reads it."""
    return parse(PLAN.arguments(variant), "test", demo_config)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def difference(first: str, second: str) -> dict[str, tuple[Any, Any]]:
    """Settings in which two variants differ."""
    one, other = (flat(as_dict(config_of(VARIANTS[name]))) for name in (first, second))
    return {key: (one[key], other[key]) for key in one if one[key] != other[key]}


# --- the plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_valid_run(name: str) -> None:
    config = config_of(VARIANTS[name])
    validate(config)
    full = config_of(VARIANTS["full"])
    assert (config.steps, config.prompts_per_step) == (full.steps, full.prompts_per_step)
    assert config.sampling.group_size == full.sampling.group_size
    assert config.sampling.max_new_tokens == full.sampling.max_new_tokens
    assert flat(as_dict(config))["eval.questions"] == flat(as_dict(full))["eval.questions"]


def test_what_the_issue_asks_for_is_there() -> None:
    by_group: dict[str, list[str]] = {}
    for variant in PLAN.variants:
        by_group.setdefault(variant.group, []).append(variant.name)
    pairs = {(config_of(VARIANTS[n]).algo, config_of(VARIANTS[n]).reward) for n in by_group["approaches"]}
    assert len(pairs) == len(by_group["approaches"]) == 4
    recipes = {config_of(VARIANTS[n]).recipe for n in by_group["baselines"]}
    assert recipes == {"seqkd", "sampled_ce", "gkd", "bond", "warp"}
    assert len(PLAN.seeds) >= 3


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("no-pt", "loss.pt_coef"), ("no-bc", "loss.bc_coef"), ("no-single-step", "loss.single_step_coef"),
        ("no-mixing", "sampling.teacher_mix"), ("no-kl", "loss.kl_coef"),
    ],
)  # fmt: skip
def test_each_part_is_taken_away_alone(name: str, key: str) -> None:
    ((with_it, without),) = difference("full", name).values()
    assert list(difference("full", name)) == [key]
    assert with_it > 0
    assert without == 0


def test_bad_plans_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    for text in ("variants: 3", "[", "seeds: [0]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a plan"):
            read_plan(path)
    twice = {"name": "a", "group": "g", "what": "w", "settings": {}}
    path.write_text(yaml.safe_dump({"seeds": [0], "common": {}, "groups": {"g": "G"}, "variants": [twice, twice]}))
    with pytest.raises(ValueError, match="same name"):
        read_plan(path)
    with pytest.raises(ValueError, match="no such variant"):
        PLAN.chosen(["nothing"])


def test_an_array_has_a_number_for_every_run() -> None:
    tasks = [Task(variant, seed) for seed in PLAN.seeds for variant in PLAN.variants]
    assert run_ablation.array_task(tasks, None) == tasks
    assert [run_ablation.array_task(tasks, str(i))[0] for i in range(len(tasks))] == tasks
    with pytest.raises(ValueError, match=f"0-{len(tasks) - 1}"):
        run_ablation.array_task(tasks, str(len(tasks)))
    assert f"--array=0-{len(tasks) - 1} " in (ROOT / "slurm" / "run_ablation.sh").read_text()


# --- the driver ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants that run and one that cannot."""
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    variants = [
        {"name": "broken", "group": "g", "what": "cannot be", "settings": {"sampling.top_p": 2.0}},
        {"name": "full", "group": "g", "what": "all of it", "settings": dict(VARIANTS["full"].settings)},
        {"name": "seqkd", "group": "g", "what": "supervised", "settings": dict(VARIANTS["seqkd"].settings)},
    ]
    common = {"steps": 2, "teacher.tensor_parallel": 1}
    path.write_text(yaml.safe_dump({"seeds": [0], "common": common, "groups": {"g": "G"}, "variants": variants}))
    return path


def drive(plan: Path, runs: Path, cache: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The script as a user calls it, on the tiny demo."""
    line = ["bash", "slurm/run_ablation.sh", "--plan", str(plan), "--runs_dir", str(runs), "--cache_dir", str(cache)]
    return subprocess.run(
        [*line, *more, *TINY],
        cwd=ROOT,
        env=environment() | env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_failures_are_named_the_others_go_on_and_nothing_is_done_twice(
    small_plan: Path, demo_cache: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    done = drive(small_plan, runs, demo_cache, "--jobs", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 runs, 0 finished already" in done.stdout
    assert "failed: broken-seed0, exit code 2" in done.stderr
    assert "top_p" in done.stderr
    table = (runs / "ablation.md").read_text()
    assert "| `full` |" in table
    assert "| `seqkd` |" in table
    assert "`broken`" not in table
    assert (runs / "ablation.png").read_bytes().startswith(b"\x89PNG")
    for name in ("full-seed0", "seqkd-seed0"):
        assert is_finished(runs / name, 2)
        assert json.loads((runs / name / "eval" / "language.json").read_text())["bits_per_byte"] > 0

    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.suffix in (".json", ".log")}
    again = drive(small_plan, runs, demo_cache, "--only", "full", "seqkd")
    assert again.returncode == 0, again.stderr
    assert "2 runs, 2 finished already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.suffix in (".json", ".log")} == before
    assert (runs / "ablation.md").read_text() == table


def test_a_task_of_an_array_does_its_run_only(small_plan: Path, tmp_path: Path) -> None:
    done = drive(small_plan, tmp_path / "runs", tmp_path / "cache", SLURM_ARRAY_TASK_ID="0")
    assert done.returncode == 1
    assert "1 runs, 0 finished already" in done.stdout
    assert "broken-seed0" in done.stderr
    assert not (tmp_path / "runs" / "ablation.md").exists()
    assert drive(small_plan, tmp_path / "runs", tmp_path / "cache", SLURM_ARRAY_TASK_ID="3").returncode == 2


# --- the tables ----------------------------------------------------------------------------------------------------

GROUPS = {"parts": "Parts", "baselines": "Baselines"}


def made_up_plan() -> Plan:
    """Three variants, two seeds."""
    variants = [
        Variant(name="full", group="parts", what="all", settings={}),
        Variant(name="no-pt", group="parts", what="less", settings={}),
        Variant(name="seqkd", group="baselines", what="supervised", settings={"recipe": "seqkd"}),
    ]
    return Plan(seeds=[0, 1], common={"steps": 10}, groups=GROUPS, variants=variants)


def made_up_run(runs: Path, name: str, f1: float, kl: float, *, tokens: int = 30_000, status: str = "finished") -> None:
    """A run folder without a model in it."""
    run = runs / name
    (run / "export").mkdir(parents=True)
    (run / "export" / "model.safetensors").write_text("")
    data = {key: "none.jsonl" for key in ("prompts", "warmup", "heldout", "text")}
    config = {"student": {"path": str(runs / "student")}, "teacher": {"path": str(runs / "teacher")}, "data": data}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {
        "status": status, "steps": 10, "seconds": {"total": 60.0}, "tokens": {"sampled": tokens},
        "eval_before": {"f1": 20.0, "exact_match": 10.0, "reverse_kl": 1.5},
        "eval_after": {"f1": f1, "exact_match": 30.0, "reverse_kl": kl},
        "teacher_eval": {"f1": 80.0, "exact_match": 70.0, "reverse_kl": 0.0},
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """Run folders, and the list of models that were measured."""
    measured: list[str] = []
    bits = {"student": 1.0, "teacher": 2.0, "full-seed0": 0.5, "full-seed1": 0.7, "no-pt-seed0": 1.5,
            "no-pt-seed1": 1.9, "seqkd-seed0": 1.1}  # fmt: skip

    def measure(path: str, texts: object, data: object) -> dict[str, float]:
        place = Path(path)
        name = place.parent.name if place.name == "export" else place.name
        measured.append(name)
        return {"bits_per_byte": bits[name], "language_rate": 100 - 10 * bits[name], "f1": -1.0}

    monkeypatch.setattr(ablation, "measure_model", measure)
    for model in ("student", "teacher"):
        (tmp_path / model).mkdir()
        (tmp_path / model / "model.safetensors").write_text("")
    made_up_run(tmp_path, "full-seed0", 50.0, 0.2)
    made_up_run(tmp_path, "full-seed1", 54.0, 0.4)
    made_up_run(tmp_path, "no-pt-seed0", 49.0, 0.1)
    made_up_run(tmp_path, "no-pt-seed1", 55.0, 0.3)
    made_up_run(tmp_path, "seqkd-seed0", 40.0, 0.9, tokens=4_000)
    made_up_run(tmp_path, "seqkd-seed1", 99.0, 0.9, status="stopped")
    (tmp_path / "text.jsonl").write_text('{"text": "Í dag er mánadagur."}\n')
    return tmp_path, measured


def results_of(runs: Path) -> list[ablation.Result]:
    tasks = [Task(variant, seed) for variant in made_up_plan().variants for seed in (0, 1)]
    found = [ablation.read_result(task, runs, runs / "text.jsonl", ["Í dag er mánadagur."]) for task in tasks]
    return [result for result in found if result is not None]


def test_tables_are_those_worked_out_by_hand(made_up: tuple[Path, list[str]]) -> None:
    runs, _ = made_up
    results = results_of(runs)
    assert len(results) == 5  # the stopped one does not count
    assert ablation.main_table(made_up_plan(), results) == [
        "| variant | F1 | F1 gained | reverse KL | bits a byte | bits a byte change | Faroese | Faroese change "
        "| tokens (k) | seconds |",
        "| --- |" + " ---: |" * 9,
        "| *start (after the warm-up)* | 20.0 |  | 1.500 | 1.000 |  | 90.0 |  | | |",
        "| *teacher* | 80.0 |  | 0.000 | 2.000 |  | 80.0 |  | | |",
        "| **Parts** |" + " |" * 9,
        # (50, 54): mean 52, deviation 4/sqrt 2; (0.5, 0.7) and (95, 93) likewise
        "| `full` | 52.0 ± 2.8 | +32.0 ± 2.8 | 0.300 ± 0.141 | 0.600 ± 0.141 | -0.400 ± 0.141 | 94.0 ± 1.4 "
        "| +4.0 ± 1.4 | 30 | 60 |",
        "| `no-pt` | 52.0 ± 4.2 | +32.0 ± 4.2 | 0.200 ± 0.141 | 1.700 ± 0.283 | +0.700 ± 0.283 | 83.0 ± 2.8 "
        "| -7.0 ± 2.8 | 30 | 60 |",
        "| **Baselines** |" + " |" * 9,
        "| `seqkd` | 40.0 | +20.0 | 0.900 | 1.100 | +0.100 | 89.0 | -1.0 | 4 (teacher's) | 60 |",
    ]
    assert ablation.parts_table(made_up_plan(), results) == [
        "| against `full` | F1 | reverse KL | bits a byte | Faroese |",
        "| --- |" + " ---: |" * 4,
        # F1: -1 and +1, the seeds do not agree; one seed alone never gets a star
        "| `no-pt` | +0.0 ± 1.4 | -0.100 ± 0.000 * | +1.100 ± 0.141 * | -11.0 ± 1.4 * |",
        "| `seqkd` | -10.0 | +0.700 | +0.600 | -6.0 |",
    ]


def test_which_runs_are_finished(made_up: tuple[Path, list[str]]) -> None:
    """As training/run.py decides: all steps, or ended by the KL limit; not what was stopped, nor what is not there."""
    runs, _ = made_up
    assert is_finished(runs / "full-seed0", 10)
    assert not is_finished(runs / "full-seed0", 11)
    assert not is_finished(runs / "seqkd-seed1", 10)
    assert not is_finished(runs / "nothing", 1)
    summary = json.loads((runs / "full-seed0" / "summary.json").read_text())
    (runs / "full-seed0" / "summary.json").write_text(json.dumps(summary | {"kl_limit_reached": True}))
    assert is_finished(runs / "full-seed0", 11)


def test_models_are_measured_once_and_again_when_they_change(made_up: tuple[Path, list[str]]) -> None:
    runs, measured = made_up
    first = results_of(runs)
    assert sorted(measured) == sorted(
        ["student", "teacher", "full-seed0", "full-seed1", "no-pt-seed0", "no-pt-seed1", "seqkd-seed0"]
    )
    measured.clear()
    assert results_of(runs) == first
    assert measured == []
    os.utime(runs / "full-seed0" / "export" / "model.safetensors", ns=(1, 1))
    results_of(runs)
    assert measured == ["full-seed0"]
    (runs / "text.jsonl").write_text('{"text": "Annar tekstur."}\n')
    measured.clear()
    results_of(runs)
    assert len(measured) == 7


def test_the_page_keeps_what_is_around_the_section(made_up: tuple[Path, list[str]]) -> None:
    judge = {"text": 99.0, "text_words": 99.9, "shuffled": 0.5, "shuffled_words": 12.0}
    section = ablation.render(made_up_plan(), results_of(made_up[0]), judge, ["seqkd-seed1"])
    assert "50 % of cases" in section  # two seeds agree by chance in half of all cases
    assert "Not finished, so not in the tables: seqkd-seed1." in section
    page = f"# Before\n\n{ablation.BEGIN}\nold\n{ablation.END}\n\nafter\n"
    new = ablation.put_between(page, section)
    assert new.startswith(f"# Before\n\n{ablation.BEGIN}\n\n")
    assert new.endswith(f"\n{ablation.END}\n\nafter\n")
    assert "old" not in new
    assert ablation.put_between(new, section) == new
    with pytest.raises(ValueError, match="needs one line"):
        ablation.put_between("nothing", section)
    text = (ROOT / "docs" / "results.md").read_text()
    assert ablation.put_between(text, "x") != text


def test_the_plot_is_a_small_picture(made_up: tuple[Path, list[str]]) -> None:
    from eval.ablation_plot import draw

    picture = draw(made_up_plan(), results_of(made_up[0]))
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 200_000
