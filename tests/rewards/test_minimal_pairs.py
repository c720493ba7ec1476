"""Minimal pairs: one mistake each, the same for the same seed; scores worked out by hand; the command."""

from __future__ import annotations

import math
import random
import unicodedata
from pathlib import Path

import pytest
import torch
import transformers

from configs.io.results import read_result
from eval.measure import main
from eval.measures.perplexity import score_texts
from rewards.minimal_pairs import (
    ENDINGS,
    FORMS,
    KINDS,
    Pair,
    accuracy_difference,
    behind_first_word,
    correlation,
    corrupt,
    make_pairs,
    score_pairs,
    wilson,
)
from tests.support.tiny_tokenizers import save_tiny

SENTENCES = [
    "Hann var ein góður maður.",
    "Tann stóri báturin sigldi til Føroya í gjár.",
    "Vit hava keypt eina nýggja bók um oyggjarnar.",
    "Børnini spældu uttanfyri húsini allan dagin.",
    "Kvinnan hevur ikki sæð hestarnar í haganum.",
    "Tey búgva í Klaksvík og arbeiða í Havn.",
    "Eg eri ikki so gamal sum hon er.",
    "Føroyar eru átjan oyggjar í Norðuratlantshavi.",
]


def differences(pair: Pair) -> int:
    """Words that are not in the same place in both."""
    return sum(a != b for a, b in zip(pair.right.split(), pair.wrong.split(), strict=True))


def test_each_pair_has_one_mistake_of_its_kind() -> None:
    pairs = [p for seed in range(20) for p in make_pairs(SENTENCES, 8, seed)]
    assert {pair.kind for pair in pairs} == set(KINDS)
    for pair in pairs:
        right, wrong = pair.right.split(), pair.wrong.split()
        assert right[0] == wrong[0]
        assert right != wrong
        assert pair.right in SENTENCES
        if pair.kind == "deletion":
            assert len(wrong) == len(right) - 1
            assert any(right[:i] + right[i + 1 :] == wrong for i in range(len(right)))
        elif pair.kind == "swap":
            assert sorted(right) == sorted(wrong)
            assert differences(pair) == 2
        else:
            assert differences(pair) == 1
            place = next(i for i in range(len(right)) if right[i] != wrong[i])
            before, after = right[place].rstrip("."), wrong[place].rstrip(".")
            if pair.kind == "form":
                assert any(before.lower() in forms and after.lower() in forms for forms in FORMS)
            else:
                stems = [
                    before.removesuffix(a) == after.removesuffix(b) and before.endswith(a) and after.endswith(b)
                    for paradigm in ENDINGS
                    for a in paradigm
                    for b in paradigm
                    if a != b
                ]
                assert any(stems), pair


def test_pairs_belong_to_the_seed() -> None:
    assert make_pairs(SENTENCES, 8, 3) == make_pairs(SENTENCES, 8, 3)
    assert make_pairs(SENTENCES, 8, 3) != make_pairs(SENTENCES, 8, 4)
    assert len(make_pairs(SENTENCES, 3, 0)) == 3
    # Decomposed letters: a mistake would be told by how it is written.
    assert make_pairs([unicodedata.normalize("NFD", one) for one in SENTENCES], 8, 3) == make_pairs(SENTENCES, 8, 3)
    assert make_pairs(["Ov stutt."], 8) == []
    assert len(make_pairs(SENTENCES + SENTENCES, 100, 0)) == len(SENTENCES)


def test_a_kind_that_does_not_apply_gives_none() -> None:
    assert corrupt("X, 1 2 3", "swap", random.Random(0)) is None
    assert corrupt("X, 1 2 3", "form", random.Random(0)) is None


def test_scores_by_hand() -> None:
    pairs = [Pair("a bcd efg", "a efg bcd", "swap"), Pair("a bcd efg", "a efg", "deletion")]
    assert behind_first_word(pairs[0].right) == " bcd efg"  # 8 characters; " efg" has 4
    scores = score_pairs(pairs, right=[-8.0, -8.0], wrong=[-16.0, -6.0])
    assert scores["accuracy"] == (0.5, *wilson(1, 2))
    assert (scores["accuracy/swap"], scores["accuracy/deletion"]) == ((1.0,), (0.0,))
    assert scores["accuracy_per_character"] == (1.0,)  # -1 against -2, and -1 against -1.5
    assert scores["bits_per_character"] == pytest.approx((16 / math.log(2) / 16,))
    # -1, -1 (right) against -2, -1.5 (wrong): mean -1.375, covariance sum 0.75, spreads 0.6875 and 1.
    assert scores["correlation"] == pytest.approx((0.75 / math.sqrt(0.6875),))
    assert score_pairs(pairs, [-1.0, -1.0], [-1.0, -1.0])["accuracy"][0] == 0.5  # ties


def test_intervals() -> None:
    low, high = wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert wilson(0, 0) == (0.0, 1.0)
    assert correlation([1.0, 1.0], [0.0, 1.0]) == 0.0
    mean, low, high = accuracy_difference([1.0] * 50 + [0.0] * 50, [0.0] * 100)
    radius = 1.959964 * math.sqrt(0.25 / 99)
    assert (mean, low, high) == (0.5, pytest.approx(0.5 - radius), pytest.approx(0.5 + radius))
    assert accuracy_difference([1.0], [0.0]) == (1.0, -1.0, 1.0)


@torch.no_grad()
def test_a_sentence_is_scored_behind_its_first_word(tmp_path: Path) -> None:
    """Against one unpadded forward pass, summed by hand."""
    directory = save_tiny(tmp_path / "model", "byte_level")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    got = [-one.nats for one in score_texts(model, tokenizer, SENTENCES, 3) if one is not None]
    for sentence, value in zip(SENTENCES, got, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]
        given = 1 + len(tokenizer(sentence.split()[0], add_special_tokens=False)["input_ids"])
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        by_hand = sum(float(logprobs[i - 1, ids[i]]) for i in range(given, len(ids)))
        assert value == pytest.approx(by_hand, abs=1e-3)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(save_tiny(tmp_path / name, "byte_level", seed)) for seed, name in enumerate(("one", "two"))]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES), encoding="utf-8")
    command = ["minimal_pairs", "--model", *models, "--text", str(text), "--runs_dir", str(tmp_path / "runs")]
    assert main(command) == 0
    assert "accuracy" in capsys.readouterr().out
    for path in models:  # what a comparison pairs
        (kept,) = (tmp_path / "runs" / "models").glob(f"{Path(path).name}-*/eval/pairs.json")
        result = read_result(kept)
        assert len(result.rows) == len(SENTENCES)
        assert sum(row["win"] for row in result.rows) / len(result.rows) == result.values["accuracy"].value
    text.write_text("eitt\n", encoding="utf-8")
    assert main(command) == 2
    assert "no sentence of 4 to 40 words" in capsys.readouterr().err
