"""The miniature's plan, split and table; the run on real weights is tests/test_miniature.py's and docs/faroese.md's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.schema import validate
from eval.miniature_plan import BASE, arguments, read_plan, split
from eval.miniature_table import bits_interval, draw, table
from eval.run_miniature import main, write_data
from rewards.minimal_pairs import Pair, score_pairs
from training.cli import parse


def test_every_arm_is_a_valid_run_and_they_share_what_is_compared() -> None:
    plan = read_plan()
    found = {}
    for arm in plan.arms:
        config = parse(arguments(plan, arm, {"data.text": Path("text.jsonl")}), "arm", lambda _: BASE)
        validate(config)
        assert config.data.template == "{question}"  # a prompt is the opening itself
        found[arm.name] = config
    grpo, text, more = found["grpo-minillm"], found["text"], found["text-more"]
    assert (grpo.algo, grpo.reward, grpo.recipe) == ("grpo", "minillm", "rl")
    # Equal tokens of text, block by block; and equal tokens in all, text and samples together.
    assert (text.sft.steps, text.sft.batch) == (grpo.steps, grpo.loss.pt_batch)
    assert text.data == more.data == grpo.data
    sampled = grpo.prompts_per_step * grpo.sampling.group_size * grpo.sampling.max_new_tokens
    block = grpo.data.text_block_tokens
    assert more.sft.steps * more.sft.batch * block == grpo.steps * (grpo.loss.pt_batch * block + sampled)
    assert text.sft.learning_rate == more.sft.learning_rate == grpo.actor.learning_rate
    assert (found["grpo-alone"].pt_coef, grpo.pt_coef) == (0.0, 1.0)
    with pytest.raises(ValueError, match="--only other: no such arm; there are text, grpo-minillm"):
        plan.chosen(["text", "other"])


def test_held_out_sentences_are_in_no_file_of_training(tmp_path: Path) -> None:
    sentences = [f"Hetta er setningur nummar {i} av mongum." for i in range(150)]
    text = tmp_path / "sentences.jsonl"
    text.write_text("".join(json.dumps({"text": s}) + "\n" for s in [*sentences, "  ".join(sentences[0].split())]))
    write_data(read_plan(), text, tmp_path / "data")

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]

    train, heldout = ([row["text"] for row in rows(name)] for name in ("text", "heldout"))
    assert sorted([*train, *heldout]) == sorted(sentences)
    assert len(heldout) == 100
    whole = [f"{row['question']} {row['answers'][0]}" for row in rows("prompts")]
    assert whole == train
    assert [row["question"] for row in rows("questions")] == [" ".join(s.split()[:3]) for s in heldout]
    assert split(sentences, 10, 0) != split(sentences, 10, 1)
    with pytest.raises(ValueError, match="heldout = 150: the text has 150 sentences"):
        split(sentences, 150, 0)


def measured(right: list[float], wrong: list[float]) -> dict[str, Any]:
    pairs = [Pair("Ein tveir", "Ein tvey", "form"), Pair("Trý fýra", "Trý fýri", "form")]
    scores = score_pairs(pairs, right, wrong)
    return {**vars(scores), "right": right, "wrong": wrong, "sentences": [pair.right for pair in pairs]}


def test_the_table_by_hand(tmp_path: Path) -> None:
    """Behind the first words are 6 and 5 characters, so 11 ln 2 nats are one bit a character."""
    bit = 11 * math.log(2)
    start, arm = measured([-bit, -bit], [-bit, -2 * bit]), measured([-bit / 2, -bit / 2], [-bit, -bit])
    low, high = bits_interval(arm, start)
    assert (low + high) / 2 == pytest.approx(-1.0)
    # Each sentence gained 5.5 bits, at -1 bit a character 6 and 5 of them: residuals 0.5 and -0.5; n / (n - 1) = 2.
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt((0.25 + 0.25) * 2) / 11)
    run = tmp_path / "grpo-minillm"
    run.mkdir()
    kl = {"eval_before": {"reverse_kl": 3.0}, "eval_after": {"reverse_kl": 2.5}}
    (run / "summary.json").write_text(json.dumps({"steps": 5, "tokens": {"sampled": 1234}, **kl}))
    config = {"loss": {"pt_batch": 4, "pt_coef": 1.0}, "data": {"text_block_tokens": 64}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "minutes.json").write_text('{"minutes": 7.04}')
    plan, found = read_plan(), {"start": start, "teacher": start, "grpo-minillm": arm}
    rows = {line.split(" | ")[0].strip("| "): line for line in table(plan, found, tmp_path).splitlines()}
    assert "| 2.000 |" in rows["start"]
    assert "| 1.000 |" in rows["grpo-minillm"]
    assert "| 75.0 |" in rows["start"]  # a tie and a win
    assert rows["grpo-minillm"].endswith("| 1,280 + 1,234 | 3.00 to 2.50 | 7.0 |")
    assert draw(plan, found).startswith(b"\x89PNG")


def test_a_folder_without_the_models_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", str(tmp_path), "--text", "t", "--runs_dir", str(tmp_path)]) == 2
    assert "no model directory smollm2-135m in it" in capsys.readouterr().err
