"""eval/perplexity.py against plain loops over a plain model, and eval/language.py on texts that anyone can judge."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from eval.language import Continuation, continue_texts, language_rate, openings, shuffled, vocabulary
from eval.perplexity import encode, load_model, main, read_texts, score
from training.demo_models import RECIPES, new_model, train_tokenizer
from training.demo_text import heldout_text

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


def by_hand(folder: Path, texts: list[str], tokenizer: Any) -> tuple[float, int, int]:
    """(bits, bytes, characters) behind each first word, one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    bits, size, characters = 0.0, 0, 0
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
        size, characters = size + len(rest.encode()), characters + len(rest)
    return bits, size, characters


@pytest.mark.parametrize("batch", [1, 3])
def test_bits_are_those_of_a_loop_over_single_tokens(model_dir: Path, batch: int) -> None:
    model, tokenizer = load_model(model_dir)
    found = score(model, tokenizer, TEXTS, batch=batch)
    bits, size, characters = by_hand(model_dir, TEXTS, tokenizer)
    assert found.bits_per_byte == pytest.approx(bits / size, rel=1e-5)
    assert found.bits_per_character == pytest.approx(bits / characters, rel=1e-5)
    assert found.perplexity == pytest.approx(2 ** (bits / found.tokens), rel=1e-5)
    assert (found.bytes, found.texts, found.skipped) == (size, 3, 1)
    assert size > characters  # á, ð, ø take two bytes


def test_every_token_of_a_long_text_is_scored_once(model_dir: Path) -> None:
    model, tokenizer = load_model(model_dir)
    text = " ".join(TEXTS * 4)
    encoded = encode(text, tokenizer)
    assert encoded is not None
    longest = 16
    found = score(model, tokenizer, [text], longest=longest)
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
    assert found.bits_per_byte == pytest.approx(bits / encoded.bytes, rel=1e-4)


def test_a_start_token_is_given_and_not_scored(model_dir: Path) -> None:
    _, tokenizer = load_model(model_dir)
    without = encode(TEXTS[0], tokenizer)
    tokenizer.bos_token = "</s>"
    with_start = encode(TEXTS[0], tokenizer)
    assert without is not None
    assert with_start is not None
    assert with_start.ids == [tokenizer.eos_token_id, *without.ids]
    assert with_start.scored == without.scored + 1
    assert with_start.bytes == without.bytes == len(" dag er mánadagur.".encode())


def test_command_line(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert read_texts(tmp_path / "a.txt") == read_texts(tmp_path / "a.jsonl") == TEXTS
    (tmp_path / "da.txt").write_text("Mandag er en dag.\nAnna er hjemme.\n", encoding="utf-8")
    runs = ["--runs_dir", str(tmp_path / "runs")]
    both = [f"fo={tmp_path / 'a.txt'}", str(tmp_path / "da.txt")]
    assert main(["--model", str(model_dir), "--text", *both, *runs]) == 0
    (file,) = (tmp_path / "runs" / "models").glob("*/eval/perplexity.json")
    found = json.loads(file.read_text())["texts"]
    assert list(found) == ["fo", "da"]
    assert f"{found['fo']['bits_per_byte']:.4f}" in capsys.readouterr().out
    for numbers in found.values():  # the texts' own bits add up to the mean; a single word has none
        each = [one for one in numbers["each"] if one is not None]
        assert len(each) == numbers["texts"]
        assert sum(one[0] for one in each) / sum(one[1] for one in each) == pytest.approx(
            numbers["bits_per_byte"], rel=1e-4
        )
    assert [one is None for one in found["fo"]["each"]] == [False, False, True, False]
    assert main(["--model", str(tmp_path / "none"), "--text", str(tmp_path / "a.txt"), *runs]) == 2
    assert main(["--model", str(model_dir), "--text", str(tmp_path / "none.txt"), *runs]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["--model", str(model_dir), "--text", "fo=a", "fo=b", *runs]) == 2
    assert "a second text called 'fo'" in capsys.readouterr().err


# --- language ------------------------------------------------------------------------------------------------------

KNOWN = frozenset(["í", "dag", "er", "mánadagur", "anna", "heima", "eitt", "land"])


def test_words_of_a_continuation() -> None:
    assert Continuation("Í dag", " er mánad", False).words() == ["er"]  # cut off: not a whole word
    assert Continuation("Í dag", " er mánad", True).words() == ["er", "mánad"]
    assert Continuation("Í dag", "urin er.", False).words() == ["dagurin", "er"]  # the opening's word gone on with
    assert Continuation("Í dag", " er A\u0301", True).words() == ["er", "á"]  # decomposed
    assert Continuation("Í dag", " 12, !", True).words() == []


def test_language_rate_by_hand() -> None:
    made = [
        Continuation("Í dag", " er mánadagur", True),  # 2 of 2
        Continuation("Anna", " er hiema.", True),  # 1 of 2
        Continuation("Anna", ".", True),  # nothing
        Continuation("Eitt", " land", True),  # 1 of 1
    ]
    rate = language_rate(made, KNOWN)
    assert rate.continuations == 50
    assert rate.words == pytest.approx(100 * 4 / 5)
    assert rate.empty == 25


def test_openings_are_half_of_a_text() -> None:
    assert openings(["Anna er heima í dag.", "Ja.", "Í dag er mánadagur."], 5) == [
        ("Anna er", " heima í dag."),
        ("Í dag", " er mánadagur."),
    ]
    assert len(openings(TEXTS, 1)) == 1


def test_the_measure_tells_faroese_from_its_neighbours_and_from_noise(tmp_path: Path) -> None:
    """Held-out Faroese above 90 %; Danish, English and shuffled letters far below."""
    from training.demo_data import write_demo_data

    known = vocabulary(write_demo_data(tmp_path).values())
    texts = heldout_text()
    rng = random.Random(0)
    pairs = openings(texts, 256)
    assert len(pairs) == 256
    own = language_rate([Continuation(a, b, True) for a, b in pairs], known)
    mixed = language_rate([Continuation(a, shuffled(b, rng), True) for a, b in pairs], known)
    assert own.continuations > 90
    assert mixed.continuations < 10
    danish = ["Mandag kommer efter søndag, og vejret er dejligt.", "Hovedstaden i Danmark hedder København."]
    english = ["Monday comes after Sunday, and the weather is fine.", "The capital of Denmark is called Copenhagen."]
    foreign = language_rate([Continuation("", text, True) for text in danish + english], known)
    assert foreign.continuations == 0
    assert foreign.words < 30


def test_heldout_text_is_not_in_the_raw_text() -> None:
    from training.demo_data import build_demo_data

    data = build_demo_data()
    texts = heldout_text()
    assert len(texts) == len(set(texts)) == 400
    assert not set(texts) & set(data.text)
    contexts = {row.context for row in [*data.warmup, *data.rl, *data.heldout] if row.context}
    assert not [text for text in texts if any(text.startswith(context) for context in contexts)]


def test_samples_are_the_same_for_the_same_seed(model_dir: Path) -> None:
    model, tokenizer = load_model(model_dir)
    starts = ["Í dag", "Eitt land eitur", "Anna"]
    first = continue_texts(model, tokenizer, starts, new_tokens=6, seed=1)
    assert [one.opening for one in first] == starts
    assert first == continue_texts(model, tokenizer, starts, new_tokens=6, seed=1)
    assert first != continue_texts(model, tokenizer, starts, new_tokens=6, seed=2)
