"""Similarity, format, length and their sum, against numbers worked out by hand; and all parts in a real run."""

from __future__ import annotations

import dataclasses
import json
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from configs.checks import validate
from configs.schema import RewardConfig, RunConfig
from rewards.base import RewardInput, RewardOutput
from rewards.combine import add_parts
from rewards.parts import part_weights
from rewards.parts.similarity import METRICS, similarity
from rewards.parts.text_rules import format_score, length_score
from tests.support.runs import metrics
from training.data.demo.models import ensure_demo
from training.teacher.reward_parts import check_extra_rewards, configured_parts


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # "tann stóra ... oyggin" against "stóra oyggin": 2 words in common of 4 and of 2.
    assert similarity("Tann stóra, græna oyggin.", ["stóra oyggin"], "rouge_l") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert similarity("oyggin stóra", ["stóra oyggin"], "rouge_l") == pytest.approx(0.5)  # the order counts


def test_rouge_l_keeps_faroese_letters() -> None:
    """rouge-score's own tokenizer sees `á` and `ð` as nothing, and any two words of them as the same."""
    assert similarity("ððð", ["ááá"], "rouge_l") == 0.0
    assert similarity("ÁÐ", ["áð"], "rouge_l") == 1.0


def test_edit_distance_by_hand() -> None:
    assert similarity("Havnin", ["Havn"], "edit") == pytest.approx(1 - 2 / 6)
    assert similarity("abc", ["xyz"], "edit") == 0.0


def test_chrf_by_hand() -> None:
    # "ab" against "abc": 1-grams 2 of 2 and of 3, 2-grams 1 of 1 and of 2; no 3-gram in the response, so order 2.
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert similarity("ab", ["abc"], "chrf") == pytest.approx(
        5 * precision * recall / (4 * precision + recall), rel=1e-6
    )


def test_bleu_by_hand() -> None:
    # Two words right of two, one pair of one; the answer has three: brevity penalty exp(1 - 3/2).
    assert similarity("ein tvey", ["ein tvey trý"], "bleu") == pytest.approx(math.exp(-0.5))


@pytest.mark.parametrize("metric", METRICS)
def test_decomposed_letters_are_the_same(metric: str) -> None:
    text = "góða nátt her"
    assert similarity(text, [unicodedata.normalize("NFD", text)], metric) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_between_nothing_and_the_same(metric: str) -> None:
    answer = "Havnin liggur á Streymoy"
    assert similarity(answer, ["okkurt annað", answer], metric) == pytest.approx(1.0)  # the nearest answer counts
    assert similarity("zzz qqq", [answer], metric) <= 0.05
    assert similarity("  ", [answer], metric) == 0.0
    assert similarity("okkurt", [], metric) == 0.0
    for response in ("Havnin", "Streymoy á liggur Havnin", "hvat? " * 50, "🙂"):
        assert 0.0 <= similarity(response, [answer], metric) <= 1.0


def test_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"meteor.*rouge_l, chrf, bleu, exact_match, token_f1, edit"):
        validate(RunConfig(rewards=RewardConfig(similarity_metric="meteor")))  # type: ignore[arg-type]
    assert get_args(get_type_hints(RewardConfig)["similarity_metric"]) == tuple(METRICS)


def test_format_needs_the_whole_response_and_its_end() -> None:
    one_line = RewardConfig().format_pattern
    assert format_score("í Havn", True, one_line) == 1.0
    assert format_score("í Havn", False, one_line) == 0.0  # cut off
    assert format_score("í\nHavn", True, one_line) == 0.0
    assert format_score("", True, one_line) == 0.0
    assert format_score("i\u0301 Havn", True, "í Havn") == 1.0  # decomposed
    assert format_score("<t>x\ny</t> 7", True, r"<t>.*</t> \d") == 1.0
    assert format_score("so <t>x</t> 7", True, r"<t>.*</t> \d") == 0.0


def test_length_rises_and_falls_without_a_step() -> None:
    found = [length_score("orð " * words, 2, 4) for words in range(10)]
    assert found == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


LENGTHS_B = torch.tensor([3, 1, 0])


def test_parts_sit_on_the_last_token_and_in_every_return() -> None:
    base = RewardOutput(torch.ones(4), torch.full((4,), 2.0), {"minillm": torch.tensor([3.0, 3.0, 3.0])})
    parts = {"format": torch.tensor([1.0, 0.0, 1.0]), "language": torch.tensor([0.25, 1.0, 0.0])}
    out = add_parts(base, parts, {"format": 0.5, "language": -1.0}, LENGTHS_B)
    assert out.rewards_S.tolist() == [1.0, 1.0, 1.25, 0.0]  # 0.5 - 0.25; -1; the third is empty
    assert out.returns_S is not None
    assert out.returns_S.tolist() == [2.25, 2.25, 2.25, 1.0]
    assert {name: values.tolist() for name, values in out.parts_B.items()} == {
        "minillm": [3.0, 3.0, 3.0], "format": [1.0, 0.0, 1.0], "language": [0.25, 1.0, 0.0],
    }  # fmt: skip
    assert add_parts(base, {}, {}, LENGTHS_B) == base


def test_a_part_may_speak_of_each_token() -> None:
    base = RewardOutput(torch.ones(4), None, {})
    out = add_parts(base, {"custom": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {"custom": 0.5}, LENGTHS_B)
    assert out.rewards_S.tolist() == [1.5, 2.0, 2.5, 3.0]
    assert out.parts_B["custom"].tolist() == [6.0, 4.0, 0.0]


def test_a_part_that_is_taken_or_not_finite_is_refused() -> None:
    base = RewardOutput(torch.ones(4), None, {"format": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"two parts .* 'format'"):
        add_parts(base, {"format": torch.zeros(3)}, {"format": 1.0}, LENGTHS_B)
    with pytest.raises(ValueError, match=r"'judge' .* not finite"):
        add_parts(base, {"judge": torch.tensor([0.0, math.nan, 0.0])}, {"judge": 1.0}, LENGTHS_B)


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def short(inputs):\n    return [1.0 / (1 + len(text)) for text in inputs.texts_B]\nWORD = 'x'\n")
    inputs = RewardInput(LENGTHS_B, torch.ones(3).bool(), torch.zeros(4), torch.zeros(4), ["a", "b", ""], [(), (), ()])
    config = RunConfig(rewards=RewardConfig(custom=f"{file}:short", custom_weight=2.0))
    assert part_weights(config.rewards) == {"custom": 2.0}
    assert configured_parts(inputs, config)["custom"].tolist() == [0.5, 0.5, 1.0]
    for name, message in (
        (str(file), "must be FILE.py:FUNCTION"),
        (f"{tmp_path}/none.py:short", "no file"),
        (f"{file}:long", "has no function long"),
        (f"{file}:WORD", "has no function WORD"),
    ):
        with pytest.raises(ValueError, match=f"rewards.custom = .*{message}"):
            check_extra_rewards(RunConfig(rewards=RewardConfig(custom=name)))
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    with pytest.raises(ValueError, match=r"cannot be imported \(ModuleNotFoundError"):
        check_extra_rewards(RunConfig(rewards=RewardConfig(custom=f"{broken}:f")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"judge_weight": 1.0}, "rewards.judge.model = None: name the model"),
        ({"format_pattern": "("}, r"rewards.format_pattern = '\(': is no regular expression"),
        ({"length_min_words": 5, "length_max_words": 4}, "rewards.length_max_words = 4: must be at least .*5"),
        ({"language_weight": math.nan}, "rewards.language_weight = nan: must be a finite number"),
    ],
)
def test_bad_values_name_key_value_and_mend(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(RunConfig(), rewards=RewardConfig(**values)))  # type: ignore[arg-type]


def test_all_parts_in_a_real_run(tmp_path: Path, demo_cache: Path, train: Callable[..., object]) -> None:
    weights = {"similarity": 0.5, "language": 0.75, "format": 1.25, "length": -0.5}
    flags = [word for name, weight in weights.items() for word in (f"--rewards.{name}_weight", str(weight))]
    options = ["--name", "run", "--eval.questions", "8", "--steps", "2", "--reward", "teacher_logprob"]
    answered = str(ensure_demo(demo_cache, size="tiny").warmup)  # the demo's own prompts have open questions
    options += ["--data.prompts", answered, "--rewards.similarity_metric", "chrf"]
    train(tmp_path, *options, *flags)
    for row in metrics(tmp_path / "run"):
        total = row["reward/teacher_logprob"] + sum(w * row[f"reward/{name}"] for name, w in weights.items())
        assert row["reward/mean"] == pytest.approx(total, rel=1e-5)
        assert all(0.0 <= row[f"reward/{name}"] <= 1.0 for name in weights)
        assert row["reward/language"] > 0  # something was measured
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert weights.keys() <= sample["rewards"].keys()
