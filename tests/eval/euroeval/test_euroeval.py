"""EuroEval on our own generation: real harness, small models, and every score computed once more from what was said."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.euroeval.data import OFFICIAL
from rewards.answers import exact_match, token_f1
from tests.support.runs import ROOT, environment

if importlib.util.find_spec("euroeval") is None:
    pytest.skip("needs the extra: pip install -c constraints.txt 'euroeval>=16.11,<17'", allow_module_level=True)

LABELS = {"ja": "correct", "nei": "incorrect", "positivt": "positive", "neutralt": "neutral", "negativt": "negative"}
TAGS = {"persónur": "per", "staður": "loc", "felagsskapur": "org"}
Row = dict[str, Any]


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> dict[str, Any]:
    """What tests/support/euroeval_worker.py found, by part."""
    folder = tmp_path_factory.mktemp("euroeval")
    env = environment() | {"HF_HUB_OFFLINE": "0"}
    worker = ROOT / "tests" / "support" / "euroeval_worker.py"
    command = [sys.executable, str(worker), str(folder), str(finished_run.parent)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.fixture(scope="module")
def scored(worked: dict[str, Any], finished_run: Path) -> dict[str, Any]:
    """Stage 3 of the tiny demo; as a command: tests/test_readme.py."""
    path = finished_run / "eval" / "euroeval.json"
    return {"path": str(path), **worked["demo"], **json.loads(path.read_text())}


# --- the scores, once more -----------------------------------------------------------------------------------------


def task_of(result: Row, task: str) -> Row:
    """What the result says of a task."""
    return next(row for row in result["rows"] if row["task"] == task)


def iterations(result: Row, task: str) -> list[list[Row]]:
    """The saved generations of a task by iteration."""
    found: dict[int, list[Row]] = defaultdict(list)
    file = Path(result["path"]).parent / task_of(result, task)["generations"]
    for line in file.read_text().splitlines():
        row = json.loads(line)
        found[row["iteration"]].append(row)
    return [found[number] for number in sorted(found)]


def question_scores(rows: Sequence[Row]) -> dict[str, float]:
    """Over different ids. The demo has no character on which ASCII and Unicode rules would differ."""
    by_id = {row["id"]: (row["generation"].lower(), [text.lower() for text in row["answers"]["text"]]) for row in rows}
    count = len(by_id)
    return {
        "f1": 100 * sum(token_f1(*pair) for pair in by_id.values()) / count,
        "em": 100 * sum(exact_match(*pair) for pair in by_id.values()) / count,
    }


def label_scores(rows: Sequence[Row]) -> dict[str, float]:
    from sklearn.metrics import f1_score, matthews_corrcoef

    gold, said = [row["label"] for row in rows], [LABELS[row["prediction"]] for row in rows]
    return {
        "mcc": 100 * float(matthews_corrcoef(gold, said)),
        "macro_f1": 100 * float(f1_score(gold, said, average="macro")),
    }


def entity_scores(rows: Sequence[Row]) -> dict[str, float]:
    """From the JSON that was generated; lower case as EuroEval has it, so that runs of `o` count."""
    from seqeval.metrics import f1_score

    gold = [[label.lower() for label in row["labels"]] for row in rows]
    f1 = 100 * float(f1_score(gold, [tags_of(row) for row in rows]))
    return {"micro_f1": f1, "micro_f1_no_misc": f1}  # the demo's data have no MISC


def tags_of(row: Row) -> list[str]:
    tags = ["o"] * len(row["tokens"])
    try:
        found = json.loads(row["generation"])
    except ValueError:
        return tags
    for name, tag in TAGS.items():
        for entity in found.get(name, []):
            for number, word in enumerate(entity.split()):
                for place, token in enumerate(row["tokens"]):
                    if word in token and number == 0:
                        tags[place] = f"b-{tag}"
                    elif word in token and tags[place] == "o" and tags[place - 1].endswith(tag):
                        tags[place] = f"i-{tag}"
    return tags


SCORES = {"foqa": question_scores, "fone": entity_scores, "scala-fo": label_scores, "fosent": label_scores}


def check_scores(result: Row, tasks: Sequence[str] = OFFICIAL) -> None:
    """Every metric of every iteration, its mean and its interval."""
    assert [row["task"] for row in result["rows"]] == list(result["data"]) == list(tasks)
    for task in tasks:
        found = task_of(result, task)["scores"]
        again = [SCORES[task](rows) for rows in iterations(result, task)]
        assert len(again) == result["settings"]["iterations"]
        assert set(found) == set(again[0])
        for name, said in found.items():
            scores = [one[name] for one in again]
            value = result["values"][f"{task}/{name}"]
            assert said == pytest.approx(scores, abs=1e-6), (task, name)
            assert value["value"] == pytest.approx(sum(scores) / len(scores), abs=1e-6)
            if len(scores) == 2:  # 1.96 times the sample deviation over the root of 2
                radius = 1.96 * abs(scores[0] - scores[1]) / 2
                assert value["high"] - value["value"] == pytest.approx(radius, abs=1e-6)
                assert value["value"] - value["low"] == pytest.approx(radius, abs=1e-6)


def test_scores_are_those_of_the_generations(worked: dict[str, Any]) -> None:
    """Answers by a rule that is right now and then: no score is 0 or 100, and all are found again."""
    ruled = worked["ruled"]
    assert (ruled["status"], ruled["errors"]) == (0, [])
    check_scores(ruled["result"])
    means = [one["value"] for one in ruled["result"]["values"].values()]
    assert all(1 < abs(mean) < 99 for mean in means)


def test_the_demo_student_goes_through_all_four_tasks(scored: dict[str, Any], finished_run: Path) -> None:
    assert (scored["status"], scored["errors"]) == (0, [])
    check_scores(scored)
    assert (scored["settings"]["kind"], scored["settings"]["split"]) == ("base", "test")
    for task, data in scored["data"].items():
        found = task_of(scored, task)
        assert data["source"] == "demo"
        assert data["rows"] == {"train": 64, "val": 24, "test": 48}
        assert not found["comparable"]
        assert "the data are demo, not EuroEval's; 2 iterations, not 10" in found["why_not"]
        assert len(iterations(scored, task)[0]) == 48
    assert (finished_run / "eval" / "heldout.json").is_file()
    assert "Traceback" not in scored["err"]
    for word in ("foqa", "fone", "scala-fo", "fosent", "not comparable with EuroEval's leaderboard"):
        assert word in scored["out"]
    records = (finished_run / "eval" / "euroeval" / "euroeval_benchmark_results.jsonl").read_text().split("\n")
    assert [json.loads(line)["dataset"] for line in records if line] == list(OFFICIAL)
    assert not list((finished_run / "eval" / "euroeval").glob("*-*/"))  # no journal is left
    assert {file.name for file in (finished_run / "export").iterdir()} >= {"config.json", "model.safetensors"}


# --- labels, resuming, the hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "chat"])
def test_labels_are_those_of_scoring_each_separately(worked: dict[str, Any], name: str) -> None:
    found = worked["labels"][name]
    assert found["errors"] == []
    assert found["result"]["settings"]["kind"] == {"base": "base", "chat": "instruct"}[name]
    assert found["choices"]["rows"] > 50
    assert found["choices"]["wrong"] == 0
    assert len(found["choices"]["said"]) >= 3
    # A base model goes on behind the colon with a space, a chat model begins its turn without.
    assert all(label.startswith(" ") == (name == "base") for label in found["choices"]["said"])
    check_scores(found["result"], ("scala-fo", "fosent"))
    for task in ("scala-fo", "fosent"):
        for row in iterations(found["result"], task)[0]:
            assert row["generation"] == row["prediction"]


def test_a_broken_evaluation_goes_on(worked: dict[str, Any]) -> None:
    """The first task is kept as it is, the second goes on behind the last batch, and a third call generates nothing."""
    broken = worked["broken"]
    assert broken["before"]["rows"] == [task_of(broken["after"], "scala-fo")]
    first, second, third = broken["counts"]
    assert first < broken["all"]
    assert (first + second, third) == (broken["all"], 0)
    assert broken["after"]["values"] == broken["whole"]["values"]
    for task in ("scala-fo", "foqa"):
        assert key_of(iterations(broken["after"], task)) == key_of(iterations(broken["whole"], task))
    check_scores(broken["after"], ("scala-fo", "foqa"))


def test_an_adapter_is_measured_on_top_of_its_base(worked: dict[str, Any]) -> None:
    found = worked["adapter"]
    assert found["errors"] == []
    base, tuned, merged = (key_of(iterations(found[name], "foqa")) for name in ("under", "adapter", "merged"))
    assert tuned == merged
    assert tuned != base


def key_of(rows: Sequence[Sequence[Row]]) -> list[list[str]]:
    """What was said, in an order that does not depend on which rows were remembered."""
    return [sorted(f"{row['prompt']} {row['generation']}" for row in one) for one in rows]


def test_the_hubs_own_configurations(worked: dict[str, Any]) -> None:
    online = worked["online"]
    assert (online["up"]["status"], online["up"]["errors"]) == (0, [])
    check_scores(online["result"], ("foqa", "fosent"))
    data = online["result"]["data"]["foqa"]
    assert (data["source"], data["id"]) == ("hub", "EuroEval/foqa")
    assert data["revision"] == "0123456789abcdef0123456789abcdef01234567"
    assert task_of(online["result"], "foqa")["why_not"] == "1 iterations, not 10; the validation split"
    assert online["result"]["values"]["foqa/f1"]["low"] is None


def test_the_hub_goes_away(worked: dict[str, Any]) -> None:
    """Half-way: one line, and the next call fetches what is missing only. Wholly: one line after one question."""
    online = worked["online"]
    assert online["down"]["status"] == 2
    [error] = online["down"]["errors"]
    assert "EuroEval/fosent: the hub" in error
    assert "503" in error
    assert "give the same command again when the hub answers, or --data DIR" in error

    def fetched(name: str, data: str) -> int:
        return sum(one.startswith(f"GET /datasets/{data}/") and ".jsonl" in one for one in online[name]["asked"])

    assert (fetched("down", "EuroEval/foqa"), fetched("down", "EuroEval/fosent")) == (3, 0)
    assert (fetched("up", "EuroEval/foqa"), fetched("up", "EuroEval/fosent")) == (0, 3)
    assert online["gone"]["status"] == 2
    [error] = online["gone"]["errors"]
    assert "no data: the hub does not answer" in error
    assert len(online["gone"]["asked"]) == 1


def test_our_table_of_the_tasks_is_the_installed_one(worked: dict[str, Any]) -> None:
    kinds = {"label": "sequence_classification", "entities": "token_classification", "question": "question_answering"}
    installed, ours = worked["formats"]["installed"], worked["formats"]["ours"]
    assert set(ours) == set(installed)
    for name, (source, few_shot, labels, official, kind) in ours.items():
        assert [source, few_shot, official, kinds[kind]] == [installed[name][i] for i in (0, 1, 3, 4)]
        if kind != "question":
            assert sorted(label.lower() for label in labels) == installed[name][2]
