"""eval/measures/perplexity.py against plain loops over a plain model, and minimal pairs by its scores."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.io.jsonl import read_texts
from configs.io.results import read_result
from configs.prompts import Format
from eval.measure import main
from eval.measures import MEASURES
from eval.measures.model import Model
from eval.measures.perplexity import PerplexitySettings, encode, perplexity, score_texts
from tests.support.tiny_tokenizers import build_tokenizer
from training.data.demo.models import RECIPES, new_model, train_tokenizer

TEXTS = [
    "Í dag er mánadagur.",
    "Eitt land eitur Føroyar, og staðurin Tórshavn.",
    "Ja.",
    "Anna er heima í dag.",
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the demo's kind of tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS * 3, 320)
    new_model(RECIPES["tiny"].teacher, tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_hand(folder: Path, texts: list[str], tokenizer: Any) -> tuple[float, int]:
    """(bits, bytes) behind each first word, one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    bits, size = 0.0, 0
    for text in texts:
        first = text.split()[0]
        rest = text[len(first) :]
        if not rest:
            continue
        given, ids = tokenizer.encode(first), tokenizer.encode(text)
        assert ids[: len(given)] == given  # spaces begin tokens, so the first word's tokens are the same alone
        for place in range(len(given), len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:place]])).logits[0, -1]
            bits -= float(logits.log_softmax(-1)[ids[place]]) / math.log(2)
        size += len(rest.encode())
    return bits, size


@pytest.mark.parametrize("batch", [1, 3])
def test_bits_are_those_of_a_loop_over_single_tokens(model_dir: Path, tmp_path: Path, batch: int) -> None:
    (tmp_path / "fo.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    model = Model(path=str(model_dir))
    found = perplexity(model, PerplexitySettings(text=(str(tmp_path / "fo.txt"),), batch=batch))
    bits, size = by_hand(model_dir, TEXTS, model.tokenizer)
    tokens = sum(row["tokens"] for row in found.rows)
    assert found.values["fo/bits_per_byte"].value == pytest.approx(bits / size, rel=1e-5)
    assert found.values["fo/perplexity"].value == pytest.approx(2 ** (bits / tokens), rel=1e-5)
    assert [row["id"] for row in found.rows] == ["0", "1", "3"]  # a single word has nothing behind it
    assert (sum(row["bytes"] for row in found.rows), found.data["fo"]["rows"]) == (size, 3)


def test_every_token_of_a_long_text_is_scored_once(model_dir: Path) -> None:
    model = Model(path=str(model_dir))
    text = " ".join(TEXTS * 4)
    encoded = encode(text, Format(model.tokenizer))
    assert encoded is not None
    longest = 16
    [found] = score_texts(model.network, model.tokenizer, [text], longest=longest)
    assert found is not None
    assert found.tokens == len(encoded.ids) - encoded.scored > 3 * longest
    # The same windows by hand: from half a window back, up to `longest` tokens.
    plain = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    bits, first = 0.0, encoded.scored
    while first < len(encoded.ids):
        begin = max(0, first - longest // 2)
        window = encoded.ids[begin : begin + longest]
        with torch.no_grad():
            logprobs = plain(torch.tensor([window])).logits[0].log_softmax(-1)
        for place in range(first - begin, len(window)):
            bits -= float(logprobs[place - 1, window[place]]) / math.log(2)
        first = begin + len(window)
    assert found.nats / math.log(2) == pytest.approx(bits, rel=1e-4)


def test_long_texts_of_a_large_vocabulary_go_in_smaller_passes(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(path=str(model_dir))
    texts = [*TEXTS, " ".join(TEXTS * 3), " ".join(TEXTS * 2)]
    whole = score_texts(model.network, model.tokenizer, texts, batch=8)
    shapes: list[tuple[int, int]] = []
    hook = model.network.register_forward_pre_hook(
        lambda module, inputs, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    monkeypatch.setattr(sys.modules[perplexity.__module__], "LOGITS", 40 * model.network.config.vocab_size)
    again = score_texts(model.network, model.tokenizer, texts, batch=8)
    hook.remove()
    assert len(shapes) > 2
    assert all(rows * tokens <= 40 or rows == 1 for rows, tokens in shapes)
    assert sum(rows for rows, _ in shapes) == 5  # all but the text of a single word
    found, expected = ([(one.tokens, one.nats) for one in scores if one is not None] for scores in (again, whole))
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [nats for _, nats in found] == pytest.approx([nats for _, nats in expected], rel=1e-5)


def test_a_start_token_is_given_and_not_scored(model_dir: Path) -> None:
    tokenizer = Model(path=str(model_dir)).tokenizer
    without = encode(TEXTS[0], Format(tokenizer))
    tokenizer.bos_token = "</s>"
    with_start = encode(TEXTS[0], Format(tokenizer))
    assert without is not None
    assert with_start is not None
    assert with_start.ids == [tokenizer.eos_token_id, *without.ids]
    assert with_start.scored == without.scored + 1
    assert with_start.bytes == without.bytes == len(" dag er mánadagur.".encode())


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "unigram"])
@pytest.mark.parametrize("text", ["the sea <s> and </s> the town", "<s> the town", "the town <s>", "the town </s> é"])
def test_the_name_of_a_symbol_in_raw_text_is_text(kind: str, text: str) -> None:
    """As in the training data, where no symbol is read out of a text."""
    tokenizer = build_tokenizer(kind)
    found = encode(text, Format(tokenizer))
    assert found is not None
    ids = found.ids[1:]  # behind <s>, the start
    assert ids == Format(tokenizer).text(text)
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
    first = text.split()[0]
    if kind != "unigram":  # which does not know `<`; a space more may stand around the name
        assert tokenizer.decode(found.ids[found.scored :]).split() == text[len(first) :].split()
    assert found.bytes == len(text[len(first) :].encode())


def test_command_line(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert read_texts(tmp_path / "a.txt") == read_texts(tmp_path / "a.jsonl") == TEXTS
    (tmp_path / "da.txt").write_text("Mandag er en dag.\nAnna er hjemme.\n", encoding="utf-8")
    runs = ["--runs_dir", str(tmp_path / "runs")]
    both = [f"fo={tmp_path / 'a.txt'}", str(tmp_path / "da.txt")]
    assert main(["perplexity", "--model", str(model_dir), "--text", *both, *runs]) == 0
    (file,) = (tmp_path / "runs" / "models").glob("*/eval/perplexity.json")
    found = read_result(file)
    assert list(found.data) == ["fo", "da"]
    said = capsys.readouterr().out
    for name in found.data:  # the texts' own bits add up to the mean
        rows = [row for row in found.rows if row["text"] == name]
        mean = found.values[f"{name}/bits_per_byte"]
        assert sum(row["bits"] for row in rows) / sum(row["bytes"] for row in rows) == pytest.approx(
            mean.value, rel=1e-4
        )
        assert f"{mean.value:.4g} ({mean.low:.4g} to {mean.high:.4g})" in said
    text = str(tmp_path / "a.txt")
    assert main(["perplexity", "--model", str(tmp_path / "none"), "--text", text, *runs]) == 2
    assert "none: no such directory" in capsys.readouterr().err
    assert main(["perplexity", "--model", str(model_dir), "--text", str(tmp_path / "none.txt"), *runs]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["perplexity", "--model", str(model_dir), "--text", "fo=a", "fo=b", *runs]) == 2
    assert "a second text called 'fo'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["wit", "--model", str(model_dir)])
    assert "invalid choice: 'wit' (choose from" in (said := capsys.readouterr().err)
    assert all(name in said for name in MEASURES)


def test_minimal_pairs_are_decided_by_the_bits_of_whole_sentences(model_dir: Path, tmp_path: Path) -> None:
    sentences = ["Anna er heima í dag.", "Í dag er mánadagur í Havn.", "Hon hevur ein reyðan bil."]
    text = tmp_path / "right.txt"
    text.write_text("\n".join(sentences), encoding="utf-8")
    assert main(["minimal_pairs", "--model", str(model_dir), "--text", str(text), "--runs_dir", str(tmp_path)]) == 0
    (file,) = (tmp_path / "models").glob("*/eval/pairs.json")
    found = read_result(file)
    tokenizer = Model(path=str(model_dir)).tokenizer
    bits = [[by_hand(model_dir, [row[side]], tokenizer)[0] for side in ("right", "wrong")] for row in found.rows]
    assert len(bits) == 3
    assert [row["win"] for row in found.rows] == [float(right < wrong) for right, wrong in bits]
    assert found.values["accuracy"].value == pytest.approx(sum(right < wrong for right, wrong in bits) / 3)
    characters = sum(len(row["right"]) - len(row["right"].split()[0]) for row in found.rows)
    assert found.values["bits_per_character"].value == pytest.approx(sum(r for r, _ in bits) / characters, rel=1e-5)
    assert sorted({key.partition("/")[2] for key in found.values if "/" in key}) == sorted(
        {row["kind"] for row in found.rows}
    )
