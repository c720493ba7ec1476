"""eval/compare.py: numbers and intervals that can be checked by hand, marks on what may not be compared."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from eval.compare import main
from eval.measures.intervals import translations
from eval.measures.model import output_folder
from eval.pages.compare_models import Entrant, entrants_of, published, with_own_names
from eval.pages.compare_page import render_comparison
from eval.pages.compare_scores import ORDER, Score, measure
from eval.pages.comparison import compare, gap_closed
from eval.pages.page_parts import number, signed
from tests.eval.pages.test_report import Page
from tests.support.compare_files import (
    euroeval,
    evaluation,
    perplexity,
    result,
    write_everything,
    write_json,
    write_run,
)


def test_rows_numbers_and_changes(tmp_path: Path) -> None:
    run = write_run(tmp_path, "one", str(tmp_path / "start"))
    found = compare(entrants_of([run], [], tmp_path))
    assert [(one.name, one.kind) for one in found.entrants] == [
        ("Student before", "before"), ("Student after", "after"), ("Teacher", "teacher"),
    ]  # fmt: skip
    assert found.keys == ["heldout/f1", "heldout/exact_match", "heldout/reverse_kl"]
    before, after, _ = (found.cell(one, "heldout/f1") for one in found.entrants)
    assert before is not None
    assert after is not None
    # 4 and 20 of 40 right: the normal approximation of a share and of a paired difference (16 of 40 changed).
    assert (before.score.value, after.score.value) == (10.0, 50.0)
    assert before.change is None
    assert after.change is not None
    assert after.change.value == pytest.approx(40.0)
    radius = 196 * math.sqrt(0.4 * 0.6 / 40)
    assert after.change.low == pytest.approx(40 - radius, abs=2.6)  # a resample moves in steps of 2.5
    assert after.change.high == pytest.approx(40 + radius, abs=2.6)
    assert after.paired == 40
    assert after.clear
    # Nothing is known of single questions for the reverse KL: a value without an interval.
    kl = found.cell(found.entrants[1], "heldout/reverse_kl")
    assert kl is not None
    assert (kl.score.value, kl.score.low, kl.change) == (2.0, None, None)
    assert gap_closed(found, "heldout/f1", found.entrants[1]) == pytest.approx(100 * (50 - 10) / (95 - 10))
    assert gap_closed(found, "heldout/reverse_kl", found.entrants[1]) == pytest.approx(50.0)
    assert gap_closed(found, "heldout/f1", found.entrants[2]) is None


def test_other_questions_are_marked_and_not_paired(tmp_path: Path) -> None:
    run = write_run(tmp_path, "one", str(tmp_path / "start"))
    other = evaluation(30)
    other["rows"][7]["answers"] = ["Vágur"]  # one question differs: another test
    write_json(run / "eval" / "after.json", other)
    found = compare(entrants_of([run], [], tmp_path))
    after = found.cell(found.entrants[1], "heldout/f1")
    assert after is not None
    assert after.change is None
    assert [found.notes[mark] for mark in after.marks] == ["not comparable with Student before: other questions"]
    assert gap_closed(found, "heldout/f1", found.entrants[1]) is None


def test_a_question_that_is_there_twice_takes_no_interval_away(tmp_path: Path) -> None:
    run = write_run(tmp_path, "one", str(tmp_path / "start"))
    for name, right in (("before", 4), ("after", 20)):
        content = evaluation(right)
        for row in content["rows"][-2:]:
            row |= {"id": None, "question": "Hvat?", "context": None}
        write_json(run / "eval" / f"{name}.json", content)
    found = compare(entrants_of([run], [], tmp_path))
    after = found.cell(found.entrants[1], "heldout/f1")
    assert after is not None
    assert after.change is not None
    assert (after.paired, after.change.value) == (40, pytest.approx(40.0))


def test_bits_of_another_text_are_marked(tmp_path: Path) -> None:
    run, _ = write_everything(tmp_path)
    write_json(run / "eval" / "perplexity.json", perplexity(1.8, sha256="another"))
    found = compare(entrants_of([run], [], tmp_path))
    after = next(one for one in found.entrants if one.kind == "after")
    bits, danish = found.cell(after, "bits/fo"), found.cell(after, "bits/da")
    assert bits is not None
    assert danish is not None
    assert [found.notes[mark] for mark in bits.marks] == ["not comparable with Student before: other text"]
    assert danish.marks == ()
    assert danish.change is not None
    assert danish.change.value == pytest.approx(-0.2)


def test_pairs_of_one_file_are_paired_and_those_of_the_run_are_another_matter(tmp_path: Path) -> None:
    run, _ = write_everything(tmp_path)
    found = compare(entrants_of([run], [], tmp_path))
    before, after, teacher = (found.cell(one, "pairs/accuracy") for one in found.entrants)
    assert before is not None
    assert after is not None
    assert teacher is not None
    assert (before.score.value, after.score.value) == (37.5, 62.5)
    assert after.change is not None
    assert (after.change.value, after.paired) == (pytest.approx(25.0), 4)
    assert [found.notes[mark] for mark in teacher.marks] == ["not comparable with Student before: other sentences"]


def test_a_chain_of_stages_is_one_row_each(tmp_path: Path) -> None:
    first = write_run(tmp_path, "stage1", str(tmp_path / "start"), right=(2, 10, 38))
    second = write_run(tmp_path, "stage2", str(first / "export"), right=(10, 25, 38))
    rows = entrants_of([second], [], tmp_path)
    assert [one.name for one in rows] == ["Student before", "After stage1", "After stage2", "Teacher"]
    assert [one.scores["heldout/f1"].value for one in rows] == [5.0, 25.0, 62.5, 95.0]
    # Stage 1's own `before` is of the start; that of stage 2 is of what stage 1 made.
    (first / "eval" / "after.json").unlink()
    rows = entrants_of([second], [], tmp_path)
    assert rows[1].scores["heldout/f1"].value == 25.0
    # Two runs from one start: one row before, one teacher.
    third = write_run(tmp_path, "other", str(first / "export"), right=(10, 30, 38))
    names = [one.name for one in entrants_of([second, third], [], tmp_path)]
    assert names == ["Student before", "After stage1", "After stage2", "After other", "Teacher"]


def test_runs_of_two_students_are_compared_with_their_own_starts_and_teachers(tmp_path: Path) -> None:
    first = write_run(tmp_path, "one", str(tmp_path / "a" / "student"))
    second = write_run(tmp_path, "two", str(tmp_path / "b" / "student"), right=(16, 24, 32))
    config = yaml.safe_load((second / "config.yaml").read_text())
    (second / "config.yaml").write_text(yaml.safe_dump(config | {"teacher": {"path": str(tmp_path / "other")}}))
    found = compare(entrants_of([first, second], [], tmp_path))
    rows = {one.name: one for one in found.entrants}
    starts = ["Student before", "Student before (student)"]
    assert list(rows) == [*starts, "After one", "After two", "Teacher", "Teacher (other)"]
    one, two = (found.cell(rows[name], "heldout/f1") for name in ("After one", "After two"))
    assert one is not None
    assert two is not None
    assert one.change is not None
    assert two.change is not None
    assert ([one.base, two.base], found.baselines) == (starts, starts)
    assert (one.change.value, two.change.value) == (pytest.approx(40.0), pytest.approx(20.0))
    # 10 to 50 on the way to 95; 40 to 60 on the way to 80.
    assert gap_closed(found, "heldout/f1", rows["After one"]) == pytest.approx(100 * 40 / 85)
    assert gap_closed(found, "heldout/f1", rows["After two"]) == pytest.approx(50.0)
    page = render_comparison(found, {}, "t")
    assert "<strong>After two.</strong> Held-out questions, F1, %: 40.0 to 60.0, +20.0" in page


def test_published_and_incomparable_numbers_are_marked(tmp_path: Path) -> None:
    run, model = write_everything(tmp_path)
    found = compare([*entrants_of([run], [str(model)], tmp_path), *published()])
    rows = {one.name: found.cell(one, "euroeval/foqa/f1") for one in found.entrants}
    texts = {name: [found.notes[mark] for mark in cell.marks] for name, cell in rows.items() if cell is not None}
    assert texts["Student after"] == ["demo data"]
    assert rows["Student after"].change is not None  # type: ignore[union-attr]
    assert rows["Student after"].change.value == pytest.approx(10.0)  # type: ignore[union-attr]
    assert texts["stranger"] == ["not comparable with Student before: other data"]
    assert texts["gemma-3-27b-it"][0].startswith("published (EuroEval leaderboard, Faroese)")
    assert rows["gemma-3-27b-it"].score.value == 72.7  # type: ignore[union-attr]
    assert texts["GPT-4-turbo"][0].startswith("published (FoQA: ")
    assert all(cell.marks for cell in rows.values() if cell is not None)


def test_foqa_is_paired_by_question(tmp_path: Path) -> None:
    """Two iterations that drew some questions twice: a question counts as often as it was drawn, in both models; quotes
    that are not ASCII count as the harness counts them, or the change would not be that of the values beside it."""
    run, _ = write_everything(tmp_path)
    for folder, right in ((output_folder(tmp_path / "start", tmp_path), "q1"), (run / "eval", "q1 q2")):
        rows = [
            {"iteration": n, "id": name, "prediction": {"prediction_text": "Havn" if name in right else "“Havn”"},
             "answers": {"text": ["Havn", "Tórshavn"]}}
            for n, name in ((0, "q1"), (0, "q2"), (0, "q2"), (1, "q3"))
        ]  # fmt: skip
        (folder / "euroeval").mkdir()
        (folder / "euroeval" / "foqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare(entrants_of([run], [], tmp_path))
    after = found.cell(found.entrants[1], "euroeval/foqa/f1")
    assert after is not None
    assert after.change is not None
    assert (after.change.value, after.paired) == (pytest.approx(50.0), 3)  # q2 was drawn in two of four rows
    assert after.score.value == 22.0  # the harness's own
    mcc = found.cell(found.entrants[1], "euroeval/scala-fo/mcc")
    assert mcc is not None
    assert mcc.paired == 10


def test_every_published_figure_has_a_source_and_a_measure() -> None:
    rows = published()
    assert len(rows) == 11
    for one in rows:
        assert one.source.startswith("https://")
        assert one.scores
        for key, score in one.scores.items():
            assert key in ORDER
            assert -100 <= score.value <= 100
            assert score.caveat


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("- {model: a, source: s, foqa/f1: 1}\n- {model: a, source: s, foqa/em: 2}", "row 2: 'a' of s is there twice"),
        ("- {model: a, source: t}", "row 1: no 't'"),
        ("- {model: a, source: s, foqa/f1: high}", "row 1: could not convert string to float: 'high'"),
    ],
)
def test_a_published_figure_that_is_none_is_named(rows: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "published.yaml"
    file.write_text(f"sources:\n  s: {{title: T, address: https://a, caveat: c}}\nfigures:\n{rows}\n")
    with pytest.raises(ValueError, match=f"published.yaml: figures, {message}"):
        published(file)


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = write_everything(tmp_path)
    assert main(["--run", "one", "--model", str(model), "--runs_dir", str(tmp_path)]) == 0
    table = (run / "compare.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "| Student after | 50.0 [" in table
    assert "**+40.0 [" in table
    assert "−" in table  # bits went down
    page = (run / "compare.html").read_text(encoding="utf-8")
    assert Page(page).open == []
    assert "http" not in re.sub(r"https://(euroeval\.com|arxiv\.org/abs/2502\.07642)", "", page)
    assert "<script" not in page
    assert "47 % of the way to the teacher" in page  # (50 - 10) / (95 - 10)
    assert page.count('<figure role="img" aria-label="') == len(list(run.glob("plots/compare-*.png")))
    assert "F1, %: Student before 10.0 [" in page
    for png in run.glob("plots/compare-*.png"):
        assert png.read_bytes().startswith(b"\x89PNG")
    # Answers and translations of all who gave them, the same ones for each.
    cards = re.findall(r"<article>.*?</article>", page, flags=re.DOTALL)
    questions = [card for card in cards if "høvuðsstaðurin" in card]
    assert len(questions) == 10
    assert all(card.count("<dt>") == 4 for card in questions)
    assert sum("English to Faroese" in card for card in cards) == 3


def test_latex_is_whole(tmp_path: Path) -> None:
    run, _ = write_everything(tmp_path)
    assert main(["--run", str(run), "--runs_dir", str(tmp_path)]) == 0
    text = (run / "compare.tex").read_text(encoding="utf-8")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 5
    for block in re.findall(r"\\begin\{tabular\}\{(l(?:r+))\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL):
        columns, body = block
        for row in (line for line in body.splitlines() if line.endswith(r"\\")):
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1, row
    assert not re.search(r"(?<!\\)[%_#](?!.*usepackage)", text.replace(r"% \usepackage{booktabs}", ""))
    if shutil.which("pdflatex"):
        document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{text}\end{{document}}"
        (tmp_path / "t.tex").write_text(document, encoding="utf-8")
        subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True, capture_output=True)


def test_newest_run_is_the_default_and_mistakes_get_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--runs_dir", str(tmp_path)]) == 2
    assert "no run with config.yaml in it" in capsys.readouterr().err
    assert main(["--run", str(tmp_path / "none"), "--runs_dir", str(tmp_path)]) == 2
    assert "no config.yaml" in capsys.readouterr().err
    run, _ = write_everything(tmp_path)
    assert main(["--runs_dir", str(tmp_path)]) == 0
    assert (run / "compare.html").is_file()
    capsys.readouterr()
    assert main(["--runs_dir", str(tmp_path), "--model", str(tmp_path / "nobody")]) == 2
    assert "no evaluation of it" in capsys.readouterr().err
    write_json(run / "eval" / "perplexity.json", {**perplexity(1.0), "values": {}})
    assert main(["--runs_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "perplexity.json: not as this version writes it" in error
    (run / "eval" / "perplexity.json").unlink()
    no_answer, no_accuracy = evaluation(1) | {"rows": [{"f1": 1.0}]}, result("teacher_check", values={"a": 1})
    for name, broken in (("after", no_answer), ("minimal_pairs", no_accuracy)):
        whole = (run / "eval" / f"{name}.json").read_text()
        write_json(run / "eval" / f"{name}.json", broken)
        assert main(["--runs_dir", str(tmp_path)]) == 2
        assert f"{name}.json: not as this version writes it" in capsys.readouterr().err
        (run / "eval" / f"{name}.json").write_text(whole)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    config = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"template": "{question}"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["--run", str(run), "--runs_dir", str(tmp_path)]) == 0
    assert "No evaluation yet." in (run / "compare.html").read_text()


def test_order_of_measures_and_zeros() -> None:
    keys = ("translate/eng-fao/chrf", "bits/fo", "bits/da", "heldout/exact_match", "heldout/f1")
    scores = {key: Score(value=1.0, conditions={}) for key in keys}
    found = compare([Entrant(name="a", kind="model", source="a", scores=scores)])
    shown = [key for _, keys, _ in found.groups() for key in keys]
    assert shown == ["heldout/f1", "heldout/exact_match", "bits/fo", "bits/da", "translate/eng-fao/chrf"]
    assert (number(-0.04, 1), number(-1.0, 1), signed(-0.04, 1), signed(-0.06, 1)) == ("0.0", "−1.0", "+0.0", "−0.1")


def test_names_of_measures() -> None:
    assert measure("bits/is").name == "Icelandic"
    assert measure("translate/fao-dan/chrf").name == "Faroese to Danish, chrF++"
    assert measure("euroeval/other/accuracy").name == "other accuracy"
    assert not measure("heldout/reverse_kl").higher_is_better


def test_translations_are_scored_from_their_sentences(tmp_path: Path) -> None:
    """The interval's centre is the corpus's score by sacrebleu, not the mean over sentences."""
    run, _ = write_everything(tmp_path)
    content = json.loads((run / "eval" / "translate.json").read_text())["rows"]
    examples = translations(
        [str(row["id"]) for row in content], [row["written"] for row in content], [row["reference"] for row in content],
        "chrf",
    )  # fmt: skip
    found = compare(entrants_of([run], [], tmp_path))
    after = next(one for one in found.entrants if one.kind == "after")
    cell = found.cell(after, "translate/eng-fao/chrf")
    assert cell is not None
    assert cell.change is not None
    assert cell.change.value > 0
    assert cell.score.examples is not None
    assert (cell.score.examples.columns == examples.columns).all()


def test_translations_with_other_examples_in_the_prompt_are_marked(tmp_path: Path) -> None:
    run, _ = write_everything(tmp_path)
    for folder, examples in ((output_folder(tmp_path / "start", tmp_path), "e0"), (run / "eval", "e1")):
        content = json.loads((folder / "translate.json").read_text())
        content["data"]["eng-fao"]["examples_sha256"] = examples
        write_json(folder / "translate.json", content)
    found = compare(entrants_of([run], [], tmp_path))
    cell = found.cell(found.entrants[1], "translate/eng-fao/chrf")
    assert cell is not None
    [note] = [found.notes[mark] for mark in cell.marks]
    assert note == "not comparable with Student before: other examples in the prompt"


def test_curves_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs that still go on have a line each; the table names what differs and nothing else."""
    first, second = write_run(tmp_path, "a", "start"), write_run(tmp_path, "b", "start")
    config = yaml.safe_load((second / "config.yaml").read_text())
    config["sampling"] = {"max_new_tokens": 16}
    (second / "config.yaml").write_text(yaml.safe_dump(config | {"threads": 7}))
    (second / "summary.json").unlink()
    (second / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 5.0}\n{"step": 2, "reward/mean": 7.0}\n{"ste')
    assert main(["--run", str(first), str(second), "--no_published"]) == 0
    assert "curves.html" in capsys.readouterr().out
    page = (first / "curves.html").read_text()
    said = re.findall(r'aria-label="(Reward: [^"]*)"', page)
    assert said == [
        "Reward: a: 0.25 mean of the responses at step 1, 7.5 mean of the responses at step 30; "
        "b: 5 mean of the responses at step 1, 7 mean of the responses at step 2"
    ]
    assert "Reverse KL to the teacher: a:" in page
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page)
    assert [(name, re.findall(r"<td>(.*?)</td>", cells)) for name, cells in rows] == [
        ("status", ["finished", "unfinished"]), ("steps", ["30", "2"]), ("sampling.max_new_tokens", ["8", "16"]),
    ]  # fmt: skip
    assert (first / "plots" / "curves-reward-mean.png").read_bytes().startswith(b"\x89PNG")
    assert 'href="curves.html"' in (first / "compare.html").read_text()


def test_models_of_one_name_have_their_own_numbers(tmp_path: Path) -> None:
    run, _ = write_everything(tmp_path)
    models = [tmp_path / folder / name for folder in "abc" for name in ("base", "gemma-3-27b-it")]
    for count, model in enumerate(models):
        write_json(output_folder(model, tmp_path) / "euroeval.json", euroeval(float(count), comparable=True))
    assert main(["--run", str(run), "--runs_dir", str(tmp_path), "--model", *map(str, models)]) == 0
    entrants = with_own_names([*entrants_of([run], list(map(str, models)), tmp_path), *published()])
    comparison, key = compare(entrants), "euroeval/foqa/f1"
    assert len({one.name for one in entrants}) == len(entrants)
    for one in entrants:
        cell = comparison.cell(one, key)
        assert cell is None if key not in one.scores else cell is not None and cell.score is one.scores[key]
    shown = dict(re.findall(r"^\| (\S.*?) \|.*?(\d+\.\d)", (run / "compare.md").read_text(), re.MULTILINE))
    assert {"base", "base (base)", f"base ({models[4]})", "gemma-3-27b-it (euroeval.com)"} <= shown.keys()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / folder, "a", "start") for folder in ("x", "y")]
    assert main(["--run", *map(str, runs), "--out", str(tmp_path), "--no_published"]) == 0
    assert "Reward: x/a: " in (tmp_path / "curves.html").read_text()
