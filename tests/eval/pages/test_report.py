"""The report shows the numbers of the run's files, loads nothing, and copes with runs that are not finished."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval.pages.report_plots import (
    MOST,
    draw_plots,
    moving_average,
    outline,
    slug_of,
    smoothing_window,
)
from eval.pages.run_files import read_run
from eval.report import main
from tests.support.compare_files import result, write_json

ROOT = Path(__file__).resolve().parents[3]
VOID = {"meta", "link", "img", "br", "hr", "input", "path", "use"}


class Page(HTMLParser):
    """Tags with attributes, the text of each table cell, and whether every tag that opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def answer(number: int, prediction: str, f1: float) -> dict:
    return {"id": number, "question": f"Spurningur {number}?", "answers": ["Oslo"], "prediction": prediction, "f1": f1}


def write_evaluation(run: Path, stage: str, values: dict, rows: list) -> None:
    about = {"path": "h.jsonl", "rows": len(rows), "of": len(rows)}
    write_json(run / "eval" / f"{stage}.json", result("heldout", data=about, values=values, rows=rows))


def make_run(run: Path, steps: int = 30, finished: bool = True) -> Path:
    (run / "eval").mkdir(parents=True)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            row = {"step": step, "reward/mean": step / 4, "kl/teacher": 3.0 - step / 20, "odd & new": 7}
            row |= {"seconds/sample": 2.0, "seconds/update": 3.0, "seconds/total": 6.0, "loss/policy": float("nan")}
            file.write(json.dumps(row) + "\n")
    before = [answer(number, "<script>Havn", 0.0) for number in range(12)]
    evals = {"before": {"f1": 12.34, "exact_match": 5.06, "reverse_kl": 2.5}}
    write_evaluation(run, "before", evals["before"], before)
    (run / "config.yaml").write_text("algo: ppo\nreward: minillm\nname: <b>\n")
    if finished:
        evals["after"] = {"f1": 45.67, "exact_match": 40.0, "reverse_kl": 1.25}
        evals["teacher"] = {"f1": 99.0, "exact_match": 98.0, "reverse_kl": None}
        after = [
            answer(number, "Oslo" if number % 2 else "Oslo Havn", 100.0 if number % 2 else 200 / 3)
            for number in range(12)
        ]
        write_evaluation(run, "after", evals["after"], after[::-1])
        write_evaluation(run, "teacher", evals["teacher"], after)
        summary = {"status": "finished", "algo": "ppo", "reward": "minillm", "steps": steps}
        summary |= {"seconds": {"total": 754.2, "sample": 100.0}, "tokens": {"sampled": 123456, "scored": 7}}
        summary |= {f"eval_{stage}": evals[stage] for stage in ("before", "after")} | {"teacher_eval": evals["teacher"]}
        (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    assert main(["--run", str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    # 45.67 - 12.34 = 33.33, 40 - 5.06 = 34.94, 1.25 / 2.5 = half.
    assert page.cells[4:] == [
        *("Student before", "12.3", "5.1", "2.500"),
        *("Student after", "45.7", "40.0", "1.250"),
        *("Change", "+33.3", "+34.9", "−50 %"),
        *("Teacher", "99.0", "98.0", "–"),
    ]
    for fact in ("finished", "ppo", "minillm", "0:12:34", "123,456", "12 questions of <code>h.jsonl</code>"):
        assert fact in text
    assert "name: &lt;b&gt;" in text


def test_answers_are_matched_and_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    main(["--run", str(run)])
    text = (run / "report.html").read_text(encoding="utf-8")
    cards = re.findall(r"<article>.*?</article>", text, flags=re.DOTALL)
    assert len(cards) == 10
    for card in cards:
        number = int(re.search(r"Spurningur (\d+)\?", card).group(1))  # type: ignore[union-attr]
        before, after, teacher = re.findall(r"(?:before|after|Teacher)</dt><dd>(.*?)</dd>", card)
        assert "✗" in before
        assert "&lt;script&gt;Havn" in before
        # after.json lists the questions in another order: they are matched by id.
        assert ("✓" in after) if number % 2 else ("◐ 67" in after)
        assert after == teacher
    assert "<script" not in text


HIDDEN = "a\u202eb\u200bc\x1b[31md\x00e\u2066f\u2028g\ud800h\ufeffi\x7fj"
SHOWN = "a[U+202E]b[U+200B]c[U+001B][31md[U+0000]e[U+2066]f[U+2028]g[U+D800]h[U+FEFF]i[U+007F]j"


def test_characters_that_nobody_sees_are_shown(tmp_path: Path) -> None:
    """In an answer and in a setting; line feeds, tabs and Faroese stay."""
    run = make_run(tmp_path / "one")
    (run / "config.yaml").write_text("name: a\u202eb\n\tð: ø\n", encoding="utf-8")
    for file in (run / "eval").glob("*.json"):
        content = json.loads(file.read_text())
        for row in content["rows"]:
            row["prediction"] = HIDDEN
        file.write_text(json.dumps(content))
    assert main(["--run", str(run)]) == 0
    text = (run / "report.html").read_bytes().decode()
    assert text.count(SHOWN) == 30, "three answers to each of ten questions"
    assert "name: a[U+202E]b\n\tð: ø" in text
    seen = {char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert seen <= {"\n", "\t"}


def test_nothing_is_loaded_and_everything_has_words(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    main(["--run", str(run)])
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "@import" not in text
    page = Page(text)
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert (attrs.get("href") or "#").startswith("#")
        assert (attrs.get("href") or "#")[1:] in {"", *ids}
        assert "src" not in attrs
    alts = [attrs.get("aria-label") or "" for tag, attrs in page.tags if tag == "figure"]
    assert "Reward: 0 mean of the responses at step 0, 7.25 mean of the responses at step 29" in alts
    assert "Seconds of a step by phase, mean over the run: sample 2, update 3, other 1" in alts
    assert any(alt.startswith("odd & new: 7 at step 0") for alt in alts)
    assert all(alts)
    assert not any("Policy loss" in alt for alt in alts)  # never a finite number
    assert len(alts) == len(list(run.glob("plots/*.png"))) == 4
    assert (run / "plots" / "reward-mean.png").read_bytes().startswith(b"\x89PNG")


def test_unfinished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", steps=3, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')  # killed while writing
    assert main(["--run", str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert Page(text).cells[4:] == ["Student before", "12.3", "5.1", "2.500"]
    assert "unfinished" in text
    assert "ppo" in text  # from config.yaml
    assert "has not been evaluated at its end" in text


def test_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("algo: grpo\n")
    assert main(["--run", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No step yet." in text
    assert "No evaluation yet." in text


def test_resumed_run_counts_a_step_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "x": 1}\n{"step": 1, "x": 2}\n{"step": 2, "x": 3}\n{"step": 1, "x": 20, "y": 5}\n'
    )
    run = read_run(tmp_path)
    assert run.steps == [0, 1, 2]
    assert run.metrics["x"] == [1, 20, 3]
    assert [value for value in run.metrics["y"] if value == value] == [5]  # NaN where a step has none


def test_mistakes_get_one_line(tmp_path: Path) -> None:
    def ask(run: Path) -> str:
        command = [sys.executable, str(ROOT / "eval" / "report.py"), "--run", str(run)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    assert "no such folder" in ask(tmp_path / "nowhere")
    assert "has none of config.yaml" in ask(tmp_path)


def test_moving_average_by_hand() -> None:
    nan = float("nan")
    assert moving_average(range(5), [1, 2, 6, nan, 8], 3) == ([0, 1, 2, 3, 4], pytest.approx([1.5, 3, 4, 7, 8]))
    assert moving_average([4, 5, 9], [1, 2, 6], 1) == ([4, 5, 9], [1, 2, 6])
    assert (smoothing_window(9), smoothing_window(10), smoothing_window(100)) == (1, 1, 11)


def test_a_chart_does_not_grow_with_the_run() -> None:
    """Of 50,000 steps no outlier is lost, and the line is what it would be with all of its points."""
    steps = range(1, 50_001)
    values = [step % 7 + 100.0 * (step == 31_234) for step in steps]
    points = outline(list(zip(steps, values, strict=True)))
    assert len(points) == MOST
    assert points == sorted(points)
    assert (31_234, values[31_233]) in points
    assert [v for _, v in points].count(0.0) == MOST // 2, "the lowest of each stretch"
    at, means = moving_average(steps, values, 3)
    assert (at[0], at[-1], len(at)) == (1, 50_000, MOST)
    assert means[0] == (1 + 2) / 2
    assert means[500] == sum(values[at[500] - 2 : at[500] + 1]) / 3
    began = time.process_time()
    for plot in draw_plots(steps, {"grad_norm": values, "seconds/sample": values, "seconds/total": values}):
        assert len(plot.svg) < 300_000, plot.title
    assert time.process_time() - began < 10


def test_charts_of_names_that_are_not_ascii_have_files_of_their_own() -> None:
    assert slug_of("bits/Føroyskt_á") == "bits-føroyskt-á"
    assert len({slug_of(f"bits/{name}") for name in ("á", "í", "да", "нет")}) == 4
    assert slug_of("!?") == "curve"


def test_one_step_and_no_step() -> None:
    assert draw_plots([], {}) == []
    [reward, parts, seconds] = draw_plots(
        [5], {"reward/mean": [1.0], "reward/a": [0.5], "reward/b": [0.5], "seconds/sample": [2.0]}
    )
    assert reward.alt == "Reward: 1 mean of the responses at step 5, 1 mean of the responses at step 5"
    assert "reward/a: 0.5" in parts.alt
    assert "var(--series-0)" in seconds.svg
