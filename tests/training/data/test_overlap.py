"""Evaluation contexts in the training text, by hand; repetitions; what a run says of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from configs.prompts import Format
from configs.schema import DataConfig, LossConfig, RunConfig
from training.data.overlap import data_warnings, overlap, repeated
from training.data.text import text_blocks
from training.experience import Prompt

CONTEXT = "Tórshavn er høvuðsstaður í Føroyum og størsti býur í landinum við fleiri enn tjúgu túsund."
"""15 words: three sequences of 13."""


def test_a_context_is_found_whatever_stands_around_it() -> None:
    assert overlap([CONTEXT], ["Nakað. " + CONTEXT.upper().replace(" ", "\n") + " Meira."])[0] == [CONTEXT]
    assert overlap([CONTEXT, CONTEXT], [CONTEXT])[1] == 1


def test_half_of_the_sequences_decide() -> None:
    words = CONTEXT.split()
    assert overlap([CONTEXT], [" ".join(words[:14])])[0] == [CONTEXT]  # two of three
    assert overlap([CONTEXT], [" ".join(words[:13])])[0] == []  # one of three
    assert overlap([CONTEXT], [" ".join(words[:12]), " ".join(words[12:])])[0] == []


def test_a_short_context_must_be_there_as_a_whole() -> None:
    assert overlap(["Tað regnar í Havn"], ["So hann segði: tað regnar, í Havn!"])[0] == ["Tað regnar í Havn"]
    assert overlap(["Tað regnar í Havn"], ["tað regnar ikki í Havn"])[0] == []
    assert overlap(["?!", ""], ["?!"])[1] == 0


def test_repetitions_are_counted_but_for_case_and_space() -> None:
    assert repeated(["Ein  tveir", "ein tveir", "ein tveir.", "Ein tveir\n"]) == 2


def test_a_run_says_what_is_wrong_and_leaves_repetitions_out(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in (CONTEXT, "Annað", "annað")), encoding="utf-8")
    prompt = Prompt(index=0, text="", tokens=(1,), answers=(), question="?", context=CONTEXT)
    other = tmp_path / "questions.jsonl"
    other.write_text(json.dumps({"question": "Hvat?"}) + "\n")
    config = RunConfig(data=DataConfig(text=str(file), prompts=str(other)), loss=LossConfig(pt_coef=0.1))
    first, second = data_warnings(config, [prompt])
    assert "1 of 1 held-out contexts" in first
    assert "1 of its texts are repetitions" in second
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, deduplicate=True))
    assert len(data_warnings(without, [prompt])) == 1
    assert data_warnings(dataclasses.replace(config, loss=LossConfig(pt_coef=0.0)), [prompt]) == []

    data = DataConfig(text=str(file), text_block_tokens=100)
    (whole,) = text_blocks(data, Format(Lengths(), model_ends=(0,)), tmp_path)[0]
    (unique,) = text_blocks(dataclasses.replace(data, deduplicate=True), Format(Lengths(), model_ends=(0,)), tmp_path)[
        0
    ]
    assert [*whole.prompt, *whole.responses[0]] == [len(CONTEXT), 0, 5, 0, 5, 0]
    assert [*unique.prompt, *unique.responses[0]] == [len(CONTEXT), 0, 5, 0]


class Lengths:
    """A tokenizer: a text is one token, its length."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(text)]}

    def get_vocab(self) -> dict[str, int]:
        return {}

    eos_token_id, added_tokens_decoder, all_special_tokens = None, {}, ()  # type: ignore[var-annotated]


def test_prompts_and_answers_to_imitate_are_looked_through_where_they_are_used(tmp_path: Path) -> None:
    prompts, warmup = tmp_path / "prompts.jsonl", tmp_path / "warmup.jsonl"
    prompts.write_text(json.dumps({"question": "Hvar?", "context": CONTEXT}) + "\n", encoding="utf-8")
    warmup.write_text(json.dumps({"question": CONTEXT + " Hvar?", "answers": ["har"]}) + "\n", encoding="utf-8")
    prompt = Prompt(index=0, text="", tokens=(1,), answers=(), question="?", context=CONTEXT)
    config = RunConfig(data=DataConfig(text=None, prompts=str(prompts), warmup=str(warmup)), reward="teacher_logprob")
    (line,) = data_warnings(config, [prompt])
    assert line.startswith(f"data.prompts = {str(prompts)!r}: 1 of 1 held-out contexts are in it")
    assert [line.split(" = ")[0] for line in data_warnings(config, [prompt], stage=1)] == ["data.warmup"]
    both = dataclasses.replace(config, loss=LossConfig(bc_coef=0.1))
    assert [line.split(" = ")[0] for line in data_warnings(both, [prompt])] == ["data.prompts", "data.warmup"]
    elsewhere = dataclasses.replace(prompt, context="Tann stóra oyggin eitur Streymoy og har er Tórshavn, sum eg sá.")
    assert data_warnings(both, [elsewhere]) == []


def test_held_out_questions_among_those_of_training_are_counted(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows: list[dict[str, object]] = [
        {"question": "Hvat eitur  høvuðsstaðurin?"},
        {"question": "Hvat eitur høvuðsstaðurin?", "context": "Her er Noreg."},
        {"prompt": "Hvør?"},
        {"question": "Hvør?"},
        {"messages": [{"role": "system", "content": "Ver stutt."}, {"role": "user", "content": "Nær?"}]},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = RunConfig(
        data=DataConfig(text=None, prompts=str(prompts), template="S: {question}"), reward="teacher_logprob"
    )
    asked = ("S: Hvat eitur høvuðsstaðurin?", "S: HVØR?", "Nær?")
    heldout = [Prompt(index=n, text=text, tokens=(1,), answers=("x",), question="?") for n, text in enumerate(asked)]
    (line,) = data_warnings(config, heldout)
    assert line.startswith(f"data.prompts = {str(prompts)!r}: 2 of its 5 questions are held-out ones")
    assert data_warnings(config, heldout[2:]) == []
