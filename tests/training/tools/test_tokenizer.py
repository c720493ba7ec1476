"""training/tools/tokenizer.py: the report by hand; an extended model keeps its bits a byte, and loads everywhere."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from tests.support.tiny_tokenizers import build_tokenizer, save_tiny
from training.student.loading import load_policy
from training.tools.tokenizer import extend, ids_of, main, report
from training.tools.tokenizer_pieces import NewPiece, extended, learn
from training.tools.tokenizer_rows import add_rows, bits_per_byte, constant_direction, shares

KINDS = ("byte_level", "sentencepiece", "unigram")
STEMS = ("føroy", "oyggj", "ver", "bát", "sjógv", "út", "fjørð", "nýggj", "hest", "æl", "kvøld", "hús", "vár", "fjall",
         "dreing", "gent", "ferð", "bók", "skúl", "býl", "heim", "land", "ting", "mál", "rødd", "kirkj")  # fmt: skip
ENDINGS = ("ur", "in", "arnar", "ini", "um", "i", "ð", "anna", "unum", "a")


def corpus(count: int = 200) -> list[str]:
    """Made-up words with Faroese letters, some frequent and most rare, in any order."""
    rng = random.Random(0)
    words = [stem + ending for stem in STEMS for ending in ENDINGS]
    rng.shuffle(words)
    weights = [1 / (rank + 3) for rank in range(len(words))]
    return [" ".join(rng.choices(words, weights, k=rng.randint(5, 10))) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each kind that has read the corpus for a few seconds."""
    folder = tmp_path_factory.mktemp("trained")
    texts = [text for place, text in enumerate(corpus()) if place % 10 != 9]
    return {kind: save_tiny(folder / kind, kind, train=texts, steps=30 if kind == "unigram" else 38) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_an_extended_model_keeps_its_bits_a_byte(
    kind: str, trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, output = corpus(), tmp_path / "extended"
    ratio = extend(trained[kind], texts, 40, output)
    assert ratio <= 1.1
    printed = capsys.readouterr().out
    assert f"({ratio:.3f} times)" in printed
    old = transformers.AutoTokenizer.from_pretrained(trained[kind])
    new = transformers.AutoTokenizer.from_pretrained(output)
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert len(new) >= len(old) + 10
    assert len(new) == model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    assert sum(len(new(t)["input_ids"]) for t in texts) < 0.95 * sum(len(old(t)["input_ids"]) for t in texts)
    for text in texts[:20]:
        assert new.decode(new(text)["input_ids"], skip_special_tokens=True).strip() == text
    # The figure once more, from what was written.
    held = texts[9::10]
    size = sum(len(t.encode()) for t in held)
    before = transformers.AutoModelForCausalLM.from_pretrained(trained[kind])
    got = bits_per_byte(model, 1, ids_of(new.backend_tokenizer, held), size) / bits_per_byte(
        before, 1, ids_of(old.backend_tokenizer, held), size
    )
    assert got == pytest.approx(ratio, rel=1e-4)
    assert load_policy(output, "float32").config.vocab_size == len(new)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_new_piece_stands_for_its_old_pieces(kind: str) -> None:
    """Every text cut with the new tokenizer, each new piece put back as its parts, is the text cut with the old one."""
    tokenizer, texts = build_tokenizer(kind), corpus(50)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    extension = learn(content, texts, 30)
    parts = {extension.first_id + i: piece.parts for i, piece in enumerate(extension.pieces)}
    new = Tokenizer.from_str(json.dumps(extended(content, extension)))
    used = set()
    for text in [*texts, "A house in the town!", "Ein ókend setning, 12 ára gomul.", "日本 🐑 é"]:
        ids = new.encode(text, add_special_tokens=False).ids
        used |= set(ids) & parts.keys()
        put_back = [part for i in ids for part in parts.get(i, (i,))]
        assert put_back == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(used) > 15


def test_the_bits_are_those_of_plain_forward_passes(trained: dict[str, Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(trained["byte_level"])
    texts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15]]
    nats = 0.0
    with torch.no_grad():
        for text in texts:
            for piece in (text[i : i + 4] for i in range(0, len(text), 4)):
                logprobs = model(torch.tensor([[1, *piece]])).logits[0].log_softmax(-1)
                nats -= sum(float(logprobs[t, id_]) for t, id_ in enumerate(piece))
    expected = nats / torch.log(torch.tensor(2.0)).item() / 20
    assert bits_per_byte(model, 1, texts, 20, longest=4) == pytest.approx(expected, rel=1e-5)


def test_shares_by_hand() -> None:
    new = {10: NewPiece("ab", (1, 2), 3), 11: NewPiece("ac", (1, 3), 1), 12: NewPiece("de", (4, 5), 5)}
    share, left = shares(new, Counter({1: 4, 10: 3, 11: 1, 12: 5}))
    assert share == {10: 3.5 / 9.5, 11: 1.5 / 9.5, 12: 5.5 / 6}
    assert left == {1: 4.5 / 9.5, 4: 0.5 / 6}
    assert share[10] + share[11] + left[1] == pytest.approx(1)


def test_the_direction_adds_a_constant(trained: dict[str, Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(trained["byte_level"])
    tokenizer = build_tokenizer("byte_level")
    ids = [[1, *one] for one in ids_of(tokenizer.backend_tokenizer, corpus(40))]
    direction = constant_direction(model, ids)
    with torch.no_grad():
        states = torch.cat([model.base_model(torch.tensor([one])).last_hidden_state[0] for one in ids])
    assert float((states @ direction).mean()) == pytest.approx(1, abs=0.05)
    assert float((states @ direction).std()) < 0.3


def test_report_by_hand() -> None:
    tokenizer = build_tokenizer("byte_level")
    found = report(tokenizer, ["the ðð", "Æ"])
    assert found.tokens == len(tokenizer("the ðð")["input_ids"]) + 2
    assert found.tokens_per_word == found.tokens / 3
    assert found.bytes_per_token == pytest.approx((3 + 1 + 4 + 2) / found.tokens)
    assert found.letters["ð"] == (2, 2, 0)  # two bytes each, never merged in English
    assert found.letters["æ"] == (1, 1, 0)
    assert found.letters["ø"] == (0, 0, 0)
    unigram = report(build_tokenizer("unigram"), ["the ðð"])
    assert unigram.letters["ð"][2] == 2
    worst = report(tokenizer, ["tree trees many æðæð hús"]).worst
    assert worst[0][0] == "æðæð"
    assert len(worst[0][2]) >= 8


def test_the_commands(trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in corpus(60)), encoding="utf-8")
    student, teacher = str(trained["byte_level"]), str(trained["unigram"])
    assert main(["report", "--student", student, "--teacher", teacher, "--text", str(text)]) == 0
    assert "lost" in capsys.readouterr().out  # the unigram's unknown letters
    output = tmp_path / "out"
    command = ["extend", "--model", student, "--text", str(text), "--output", str(output)]
    assert main([*command, "--pieces", "5"]) == 0
    assert "5 new pieces, ids from 400" in capsys.readouterr().out
    for mistake, message in (
        (command, "exists already"),
        ([*command[:-1], str(tmp_path / "x"), "--pieces", "0"], "must be at least 1"),
        (["report", "--student", str(tmp_path / "none"), "--text", str(text)], "cannot be loaded"),
        (["report", "--student", student, "--text", str(tmp_path / "none.txt")], "no such file"),
    ):
        assert main(mistake) == 2
        assert message in capsys.readouterr().err


def test_pieces_are_halved_until_the_limit_holds(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training.tools.tokenizer

    real, asked = training.tools.tokenizer._try, []

    def more_for_many(*arguments: Any) -> Any:
        asked.append(len(arguments[3].pieces))
        return *real(*arguments)[:2], 1 + asked[-1] / 200

    monkeypatch.setattr(training.tools.tokenizer, "_try", more_for_many)
    assert extend(trained["byte_level"], corpus(), 64, tmp_path / "out") == 1.08
    assert asked == [64, 32, 16]
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 416
    with pytest.raises(ValueError, match="a single new piece"):
        extend(trained["byte_level"], corpus(), 2, tmp_path / "none", limit=1.001)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_better_than_plain_means(kind: str, trained: dict[str, Path]) -> None:
    tokenizer, texts = transformers.AutoTokenizer.from_pretrained(trained[kind]), corpus()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    extension = learn(content, texts, 40)
    new = Tokenizer.from_str(json.dumps(extended(content, extension)))
    old_ids, new_ids = ids_of(tokenizer.backend_tokenizer, texts), ids_of(new, texts)
    ours = transformers.AutoModelForCausalLM.from_pretrained(trained[kind])
    add_rows(ours, extension, 1, old_ids, new_ids)
    means = transformers.AutoModelForCausalLM.from_pretrained(trained[kind])
    means.resize_token_embeddings(len(tokenizer) + 40, mean_resizing=False)
    rows = means.get_input_embeddings().weight.data
    for i, piece in enumerate(extension.pieces):
        rows[len(tokenizer) + i] = rows[list(piece.parts)].mean(0)
    assert bits_per_byte(ours, 1, new_ids, 1) < 0.95 * bits_per_byte(means, 1, new_ids, 1)


def test_a_word_piece_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="WordPiece model"):
        learn({"model": {"type": "WordPiece"}}, ["a"], 1)


def test_a_tokenizer_that_was_saved_to_cut_and_to_pad_is_measured_on_whole_texts(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    cut = Path(shutil.copytree(trained["byte_level"], tmp_path / "cut"))
    inner = Tokenizer.from_file(str(cut / "tokenizer.json"))
    inner.enable_truncation(8)
    inner.enable_padding(length=64)
    inner.save(str(cut / "tokenizer.json"))
    ratios = [extend(path, corpus(), 20, tmp_path / path.name / "out") for path in (trained["byte_level"], cut)]
    assert ratios[0] == ratios[1]
