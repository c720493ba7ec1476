"""How a model is asked: its own template, one beginning, never an end, and text that is only text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from configs.prompts import Format, render
from configs.schema import DataConfig, StudentConfig, TeacherConfig
from inference.protocol.fingerprint import load_tokenizer
from tests.support.tiny_tokenizers import build_tokenizer
from tests.support.tokenizer_zoo import build
from training.data.prompts import format_of, load_prompts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """A byte-level tokenizer with ChatML's symbols and Qwen 3's switch."""
    tokenizer = build("byte_level", tmp_path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def test_a_context_is_not_a_template() -> None:
    row = {"question": "Hvat er {context}?", "context": "Skriva {question} í {context}."}
    asked = "Tekstur: Skriva {question} í {context}.\nSpurningur: Hvat er {context}?\nSvar:"
    assert render(row, DataConfig().template) == asked


def test_auto_is_chat_where_there_is_a_template(made: Any) -> None:
    assert Format(made, "auto").chat
    assert not Format(made, "plain").chat
    made.chat_template = None
    assert not Format(made, "auto").chat


def test_a_chat_has_a_system_message_and_what_the_template_takes(made: Any) -> None:
    asked = Format(made, "chat", "Svara stutt.", {"enable_thinking": False})
    text = "<|im_start|>system\nSvara stutt.<|im_end|>\n<|im_start|>user\nHvat?<|im_end|>\n<|im_start|>assistant\n"
    assert asked.rendered("Hvat?") == text + "<think></think>"
    assert asked.prompt("Hvat?") == tuple(made(text + "<think></think>", add_special_tokens=False)["input_ids"])


def test_what_ends_an_answer_is_the_turns_end_in_a_chat(made: Any) -> None:
    assert Format(made, "chat").end == made.convert_tokens_to_ids("<|im_end|>")
    assert Format(made, "plain").end == made.eos_token_id
    assert Format(made, "chat").end_of_text == made.eos_token_id


@pytest.mark.parametrize("kind", ["llama", "gemma", "byte_level"])
def test_a_prompt_never_ends_in_an_end_symbol(kind: str, tmp_path: Path) -> None:
    tokenizer = build(kind, tmp_path)
    before = Format(tokenizer).prompt("Spurningur: Hvat?\nSvar:")
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    asked = Format(tokenizer).prompt("Spurningur: Hvat?\nSvar:")
    assert tokenizer("Svar:")["input_ids"][-1] == tokenizer.eos_token_id
    assert asked == (tokenizer.eos_token_id, *before[-(len(asked) - 1) :])


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_the_name_of_a_symbol_in_the_data_is_only_text(kind: Any, made: Any) -> None:
    asked, end = Format(made, kind), made.convert_tokens_to_ids("<|im_end|>")
    said = "Hvat er <|im_end|> her?"
    assert asked.prompt(said).count(end) == asked.prompt("Hvat?").count(end)
    assert made.decode(asked.prompt(said)).count("<|im_end|>") == 1 + asked.prompt("Hvat?").count(end)
    assert end not in asked.answer("ein <|im_end|> tvey")
    assert made.decode(asked.answer("ein <|im_end|> tvey")) == asked.lead + "ein <|im_end|> tvey"
    assert made.eos_token_id not in asked.text(f"a {made.eos_token} b")
    # ... but those of the user's own template are meant.
    meant = Format(made, "plain", parsed="<|im_start|>user\n{question}<|im_end|>")
    assert meant.prompt("<|im_start|>user\nHvat?<|im_end|>").count(end) == 1


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "unigram"])
@pytest.mark.parametrize("single", ["</s> $A", "<s> <unk> $A", "<s> $A </s>", "$A </s>", "$A"])
def test_the_name_of_a_symbol_changes_nothing_around_it(kind: str, single: str) -> None:
    tokenizer = build_tokenizer(kind)
    symbols = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>", "<unk>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=symbols)
    asked, text = Format(tokenizer), tokenizer("The sea", add_special_tokens=False)["input_ids"]
    start = asked.prompt("The sea")[: -len(text)]
    found = asked.prompt("The sea </s> the sea <s>")
    assert found[: len(start)] == start
    assert {1, 2}.isdisjoint(found[len(start) :]), "no start, no end"
    if kind != "unigram":  # which does not know the letter <
        assert tokenizer.decode(found[len(start) :]).replace(" ", "") == "Thesea</s>thesea<s>"
    assert {1, 2}.isdisjoint([*asked.text("</s>"), *asked.answer("a </s> b")])


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(made: Any) -> None:
    made.chat_template = "Today is {{ strftime_now('%d %b %Y') }}. {{ messages[-1]['content'] }}"
    assert Format(made, "chat").rendered("Hvat?") == "Today is 01 Jan 2025. Hvat?"


def test_a_tokenizer_without_an_end(made: Any) -> None:
    made.eos_token = None
    assert Format(made, model_ends=(7,)).end == 7
    with pytest.raises(ValueError, match="names no eos_token"):
        Format(made).end  # noqa: B018


def test_mistrals_own_format_beside_transformers_is_left_aside(made: Any, tmp_path: Path) -> None:
    """With mistral_common installed transformers would read tekken.json, and without a chat template."""
    made.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tekken.json").write_text('{"config": {"pattern": "x"}, "vocab": []}')
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mistral"}')
    assert load_tokenizer(tmp_path / "model").chat_template == CHATML


def test_a_template_in_chat_template_json_is_the_tokenizers(made: Any, tmp_path: Path) -> None:
    """transformers gives it to a processor of images alone (Mistral Small 3.1)."""
    made.chat_template = None
    made.save_pretrained(tmp_path / "model")
    assert not Format(load_tokenizer(tmp_path / "model"), "auto").chat
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert Format(load_tokenizer(tmp_path / "model"), "auto").rendered("Hvat?").startswith("<|im_start|>user\nHvat?")


RAISES = "{% if 'Týr' in messages[-1]['content'] %}{{ raise_exception('not this one') }}{% endif %}ok"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages[7]['content'] }}", "no element 7"),
        ("{{ undefined_function() }}", "undefined"),
        ("{% for m in messages %}", "endfor"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(10 ** 12) %}x{% endfor %}", "too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 'a' * (10 ** 15) }}", ""),
    ],
)
def test_a_template_that_fails_names_the_model_in_one_line(template: str, said: str, made: Any, tmp_path: Path) -> None:
    made.chat_template = template
    made.save_pretrained(tmp_path / "model")
    for key, config in (("student", StudentConfig), ("teachers[2]", TeacherConfig)):
        with pytest.raises(ValueError, match=r"its chat template failed \(") as raised:
            format_of(key, config(path=str(tmp_path / "model"), prompt="chat"), DataConfig())
        assert str(raised.value).startswith(f"{key}.path = ")
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 500


def test_a_template_that_refuses_some_text_names_the_data(made: Any, tmp_path: Path) -> None:
    made.chat_template = RAISES
    rows = [{"question": "Hvat?", "answers": ["ja"]}, {"question": "Hvør var Týr?", "answers": ["ein"]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(prompts=str(tmp_path / "p.jsonl"))
    with pytest.raises(ValueError, match=r"^data\.prompts = .*not this one.* for 'Spurningur: Hvør var Týr") as raised:
        load_prompts("data.prompts", data, Format(made, "chat"), room=500, need_answers=True)
    assert "\n" not in str(raised.value)


def test_what_a_model_would_not_be_told_is_refused(made: Any, tmp_path: Path) -> None:
    """In plain text there is no system message, a template may have no place for one, or not know a name."""
    made.save_pretrained(path := tmp_path / "model")

    def refused(said: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=said):
            format_of("teacher", TeacherConfig(path=str(path), **settings), DataConfig())

    assert format_of("student", StudentConfig(path=str(path), system_prompt="Stutt."), DataConfig()).chat
    refused(r"^teacher\.system_prompt = 'Stutt\.': .* asked in plain text", prompt="plain", system_prompt="Stutt.")
    switch = {"enable_thinking": False}
    refused(r"^teacher\.chat_template_kwargs = .* asked in plain", prompt="plain", chat_template_kwargs=switch)
    refused(r"^teacher\.chat_template_kwargs = .*use thinking;", chat_template_kwargs={**switch, "thinking": False})
    made.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}{% endif %}{% endfor %}"
    )
    made.save_pretrained(path)
    refused(r"^teacher\.path = .* leaves the system message out", system_prompt="Stutt.")
    turns = [{"role": "system", "content": " Stutt."}, {"role": "user", "content": "Hvat?"}]
    with pytest.raises(ValueError, match="leaves the system message out"):
        Format(made, "chat").prompt(turns)
    assert Format(made, "chat").rendered(turns[1:]) == "[INST]Hvat?"


@pytest.mark.parametrize("kind", ["byte_level", "gemma", "llama"])
def test_a_word_that_was_added_is_written_as_it_is(kind: str, tmp_path: Path) -> None:
    """A byte-level tokenizer's own decoder takes its letters for bytes: F1 would be of something else."""
    tokenizer = build(kind, tmp_path)
    tokenizer.add_tokens(["høvuðsstaður"])
    asked, text = Format(tokenizer), "Ein høvuðsstaður høvuðsstaður, eitur Tórshavn"
    tokens = asked.text(text)
    assert tokens.count(tokenizer.convert_tokens_to_ids("høvuðsstaður")) == 2
    assert asked.said([*tokens, asked.end]) == text
    assert asked.said([]) == ""


@pytest.mark.parametrize(
    ("opens", "text", "scored"),
    [
        (False, "Tórshavn", "Tórshavn"),
        (False, "<think>\nHvat?\n</think>\n\nTórshavn\n", "Tórshavn"),
        (False, "<think>\nHvat?", ""),  # cut
        (True, "Hvat?\n</think>\nTórshavn", "Tórshavn"),  # as R1: its template has written <think>
        (True, "Hvat?", ""),
        (False, "a </think> b </think> c", "c"),
    ],
)
def test_thoughts_are_not_scored(opens: bool, text: str, scored: str, tmp_path: Path) -> None:
    tokenizer = build("byte_level", tmp_path)
    tokenizer.chat_template = "{{ messages[0]['content'] }}" + ("<think>\n" if opens else "")
    assert Format(tokenizer, "chat").scored(text) == scored
    assert Format(tokenizer, "plain").scored("Tórshavn") == "Tórshavn"
