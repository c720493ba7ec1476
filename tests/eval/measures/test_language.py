"""eval/measures/language.py on texts that anyone can tell apart."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import GenerationConfig

from eval.measures.language import (
    WORD,
    Continuation,
    LanguageSettings,
    continue_texts,
    language,
    language_rate,
    openings,
    vocabulary,
)
from eval.measures.model import Model, context_length
from training.data.demo.models import RECIPES, new_model, train_tokenizer
from training.data.demo.text import heldout_text

TEXTS = [
    "Í dag er mánadagur.",
    "Eitt land eitur Føroyar, og staðurin Tórshavn.",
    "Ja.",
    "Anna er heima í dag.",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random model with the demo's kind of tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS * 3, 320)
    new_model(RECIPES["tiny"].teacher, tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model(path=str(folder))


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
    assert rate["language_rate"] == 50
    assert rate["known_words"] == pytest.approx(100 * 4 / 5)
    assert rate["empty"] == 25


def test_openings_are_half_of_a_text() -> None:
    assert openings(["Anna er heima í dag.", "Ja.", "Í dag er mánadagur."], 5) == [
        ("Anna er", " heima í dag."),
        ("Í dag", " er mánadagur."),
    ]
    assert len(openings(TEXTS, 1)) == 1


def test_words_are_those_of_the_rows_in_every_layout(tmp_path: Path) -> None:
    """Not the keys of SQuAD's answers, and the answers of the layouts that call them something else."""
    rows: list[dict[str, Any]] = [
        {"question": "Hvar?", "answers": {"text": ["Í Havn"], "answer_start": [0]}},
        {"instruction": "Sig", "input": "eina", "output": "søgu"},
        {"messages": [{"role": "user", "content": "Hvør"}, {"role": "assistant", "content": "Anna"}]},
        {"text": "Setningur"},
    ]
    file = tmp_path / "words.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert vocabulary([file]) == {"hvar", "í", "havn", "sig", "eina", "søgu", "hvør", "anna", "setningur"}


def test_the_measure_tells_faroese_from_its_neighbours_and_from_noise(tmp_path: Path) -> None:
    """Held-out Faroese above 90 %; Danish, English and shuffled letters far below."""
    from training.data.demo.sentences import write_demo_data

    known = vocabulary(write_demo_data(tmp_path).values())
    texts = heldout_text()
    rng = random.Random(0)

    def shuffled(text: str) -> str:
        """The same text with the letters of each word in another order."""
        return WORD.sub(lambda match: "".join(rng.sample(match.group(), len(match.group()))), text)

    pairs = openings(texts, 256)
    assert len(pairs) == 256
    own = language_rate([Continuation(a, b, True) for a, b in pairs], known)
    mixed = language_rate([Continuation(a, shuffled(b), True) for a, b in pairs], known)
    assert own["language_rate"] > 90
    assert mixed["language_rate"] < 10
    danish = ["Mandag kommer efter søndag, og vejret er dejligt.", "Hovedstaden i Danmark hedder København."]
    english = ["Monday comes after Sunday, and the weather is fine.", "The capital of Denmark is called Copenhagen."]
    foreign = language_rate([Continuation("", text, True) for text in danish + english], known)
    assert foreign["language_rate"] == 0
    assert foreign["known_words"] < 30


def test_heldout_text_is_not_in_the_raw_text() -> None:
    from training.data.demo.sentences import build_demo_data

    data = build_demo_data()
    texts = heldout_text()
    assert len(texts) == len(set(texts)) == 400
    assert not set(texts) & set(data.text)
    contexts = {row.context for row in [*data.warmup, *data.rl, *data.heldout] if row.context}
    assert not [text for text in texts if any(text.startswith(context) for context in contexts)]


def test_samples_are_those_of_hugging_face(model: Model) -> None:
    """The same seed says the same as `generate` does with it."""
    network, tokenizer = model.network, model.tokenizer
    starts = ["Í dag", "Eitt land eitur", "Anna"]
    first = continue_texts(network, tokenizer, starts, new_tokens=6, seed=1)
    assert [one.opening for one in first] == starts
    assert first != continue_texts(network, tokenizer, starts, new_tokens=6, seed=2)
    torch.manual_seed(1)
    tokenizer.padding_side = "left"
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=6,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    output = network.generate(**tokenizer(starts, return_tensors="pt", padding=True), generation_config=sampling)
    assert [one.opening + one.text for one in first] == tokenizer.batch_decode(output, skip_special_tokens=True)


def test_an_opening_is_text_and_does_not_end_in_an_end(model: Model) -> None:
    """A tokenizer that puts its end symbol behind every text, and a text that spells that symbol."""
    tokenizer, seen = copy.deepcopy(model.tokenizer), []
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer("Anna")["input_ids"][-1] == tokenizer.eos_token_id
    network = copy.copy(model.network)
    forward = network.forward

    def listen(*arguments: Any, **named: Any) -> Any:
        seen.append(named["input_ids"] if "input_ids" in named else arguments[0])
        return forward(*arguments, **named)

    network.forward = listen
    made = continue_texts(network, tokenizer, ["Anna", f"Anna {end} er"], new_tokens=1)
    assert [one.opening for one in made] == ["Anna", f"Anna {end} er"]
    assert all(tokenizer.eos_token_id not in ids.flatten().tolist() for ids in seen)


def test_the_measure_counts_what_was_sampled(model: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "words.jsonl").write_text('{"text": "Í dag er mánadagur. Eitt land. Anna er heima."}\n')
    settings = LanguageSettings(text=tmp_path / "text.txt", words=(str(tmp_path / "words.jsonl"),), new_tokens=6)
    found = language(model, settings)
    made = [Continuation(row["opening"], row["text"], row["ended"]) for row in found.rows]
    assert made == continue_texts(model.network, model.tokenizer, [a for a, _ in openings(TEXTS, 256)], new_tokens=6)
    rate = language_rate(made, KNOWN)
    assert found.values["language_rate"].value == pytest.approx(rate["language_rate"])
    assert found.values["known_words"].value == pytest.approx(rate["known_words"])
    assert found.data["known"] == len(KNOWN)


def test_an_opening_that_the_model_has_no_room_for_is_named(model: Model) -> None:
    room = context_length(model.network)
    assert room is not None
    with pytest.raises(ValueError, match=f"the model has room for {room}; give shorter texts"):
        continue_texts(model.network, model.tokenizer, ["Anna", "Anna er heima. " * room])
