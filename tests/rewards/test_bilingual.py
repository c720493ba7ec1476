"""The answer's translation under an English prompt: models with random weights, each step beside one done by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from configs.checks import validate
from configs.learning import BilingualConfig, RewardConfig
from configs.models import StudentConfig, TeacherConfig
from configs.schema import RunConfig
from inference.attention.packing import Group
from tests.support.tiny_tokenizers import build_tokenizer, save_tiny
from tests.training.teacher.test_teaching import rollout
from training.teacher.bilingual import Bilingual, Translator, translated_scores
from training.teacher.facts import teacher_facts
from training.teacher.link import TeacherLink

TEXTS = ["Tórshavn er høvuðsstaður", "", "Ja", "oyggin"]


def test_the_mark_is_the_mean_of_a_token() -> None:
    marks = translated_scores(torch.tensor([-1.0, -3.0, -5.0]), [2, 1])
    assert marks.tolist() == [-2.0, -5.0]
    assert translated_scores(torch.zeros(0), []).tolist() == []


def save_t5(directory: Path) -> Path:
    tokenizer = build_tokenizer("byte_level")
    torch.manual_seed(3)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
            decoder_start_token_id=0, eos_token_id=2, initializer_factor=3.0,
        )
    )  # fmt: skip
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return with_habits(directory)


def with_habits(directory: Path) -> Path:
    """A generation_config.json that would sample and penalise; nothing of it may reach a translation."""
    file = directory / "generation_config.json"
    own = json.loads(file.read_text()) if file.is_file() else {}
    habits = {"repetition_penalty": 1.9, "no_repeat_ngram_size": 1, "min_new_tokens": 5, "num_beams": 3}
    file.write_text(json.dumps({**own, **habits, "do_sample": True, "temperature": 3.0, "suppress_tokens": [5, 6, 7]}))
    return directory


@torch.no_grad()
def greedy_t5(directory: Path, text: str, count: int) -> str:
    """One text alone, without cache, padding or generate."""
    model = T5ForConditionalGeneration.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids, out = torch.tensor([tokenizer(text)["input_ids"]]), [0]
    while len(out) <= count and out[-1] != 2:
        out.append(int(model(input_ids=ids, decoder_input_ids=torch.tensor([out])).logits[0, -1].argmax()))
    return str(tokenizer.decode(out, skip_special_tokens=True)).strip()


@torch.no_grad()
def greedy_causal(directory: Path, text: str, count: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text)["input_ids"]
    out = list(ids)
    while len(out) < len(ids) + count and out[-1] != 2:
        out.append(int(model(input_ids=torch.tensor([out])).logits[0, -1].argmax()))
    return str(tokenizer.decode(out[len(ids) :], skip_special_tokens=True)).strip().split("\n", 1)[0].strip()


@pytest.mark.parametrize("batch", [1, 3])
def test_translations_are_greedy_whatever_they_are_batched_with(tmp_path: Path, batch: int) -> None:
    t5, causal = save_t5(tmp_path / "t5"), with_habits(save_tiny(tmp_path / "causal", "byte_level", seed=5))
    by_t5 = Translator(BilingualConfig(path=str(t5), instruction="en: {text}", max_new_tokens=6, batch=batch))
    found = by_t5(TEXTS)
    assert found == [greedy_t5(t5, f"en: {text}", 6) if text else "" for text in TEXTS]
    assert any(found)
    words = "Faroese: {text}\nEnglish:"
    by_causal = Translator(BilingualConfig(path=str(causal), instruction=words, max_new_tokens=6, batch=batch))
    found = by_causal(TEXTS)
    assert found == [greedy_causal(causal, words.replace("{text}", text), 6) if text else "" for text in TEXTS]
    assert any(found)


@torch.no_grad()
def test_a_text_longer_than_the_translators_context_is_cut(tmp_path: Path) -> None:
    """A student's answer may be longer than the 512 tokens of a Marian model."""
    tokenizer = build_tokenizer("byte_level")
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    model = MarianMTModel(
        MarianConfig(
            vocab_size=len(tokenizer), decoder_vocab_size=len(tokenizer), d_model=32, max_position_embeddings=16,
            pad_token_id=0, decoder_start_token_id=0, eos_token_id=2, **sizes,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer(text := "Tórshavn Q1 W2 X3 Y4 Z5 Q6 W7 X8")["input_ids"]
    assert len(ids) > 16
    out = model.eval().generate(torch.tensor([ids[:16]]), max_new_tokens=6, num_beams=1)
    translate = Translator(BilingualConfig(path=str(tmp_path), max_new_tokens=6))
    assert translate([text]) == [tokenizer.decode(out[0], skip_special_tokens=True).strip()]
    # What a causal model goes on from is the end of its prompt.
    small = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
    causal = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **small))  # type: ignore[arg-type]
    causal.save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    cut = Translator(BilingualConfig(path=str(tmp_path / "causal"), instruction="{text}", max_new_tokens=6))
    whole = tokenizer.decode(ids[-10:])
    assert tokenizer(whole)["input_ids"] == ids[-10:]
    assert cut([text]) == [greedy_causal(tmp_path / "causal", whole, 6)]


class Teacher:
    """A client whose server is transformers."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval()

    def info(self) -> Any:
        return SimpleNamespace(max_positions=256)

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> Future[torch.Tensor]:
        found = []
        for group in groups:
            for response in group.responses:
                logits = self.model(torch.tensor([[*group.prompt, *response]])).logits[0, len(group.prompt) - 1 : -1]
                found.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0])
        future: Future[torch.Tensor] = Future()
        future.set_result(torch.cat(found))
        return future


def test_the_teacher_marks_the_translation_under_the_english_prompt(tmp_path: Path) -> None:
    from dataclasses import replace

    directory = save_tiny(tmp_path / "teacher", "byte_level")
    tokenizer, client = AutoTokenizer.from_pretrained(directory), Teacher(directory)
    models = {"student": StudentConfig(path=str(directory)), "teacher": TeacherConfig(path=str(directory))}
    run = RunConfig(**models)  # type: ignore[arg-type]
    link = TeacherLink(client, teacher_facts(run, run.teacher), None)  # type: ignore[arg-type]
    config = BilingualConfig(path=str(save_t5(tmp_path / "t5")), max_new_tokens=6)
    translate = Translator(config)
    sampled = rollout(tokenizer, ["Tórshavn", ""], [True, False])
    asked = replace(sampled.prompts_N[0], question="Hvat eitur býurin?", context="Ein býur.", question_en="Which town?")
    sampled = replace(sampled, prompts_N=[asked], group_size=2)
    scores_B = Bilingual(config, translate, link).ask(sampled)()
    (context,) = translate(["Ein býur."])
    prompt = tokenizer(f"Text: {context}\nQuestion: Which town?\nAnswer:")["input_ids"]
    expected = []
    for text in translate(["Tórshavn", ""]):
        answer = [*tokenizer(" " + text, add_special_tokens=False)["input_ids"], 2] if text else [2]
        with torch.no_grad():
            logits = client.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        expected.append(float(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).mean()))
    assert scores_B.tolist() == pytest.approx(expected, abs=1e-5)
    assert all(value < 0 for value in expected)


def test_bad_values_name_key_value_and_mend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rewards.bilingual.path = None: name the model"):
        validate(RunConfig(rewards=RewardConfig(bilingual_weight=1.0)))
    with pytest.raises(ValueError, match=r"rewards.bilingual.instruction = 'Translate': must contain {text}"):
        validate(RunConfig(rewards=RewardConfig(bilingual=BilingualConfig(instruction="Translate"))))
    with pytest.raises(ValueError, match=r"rewards.bilingual.target_language = 'xx_Latn': no token of"):
        Translator(BilingualConfig(path=str(save_t5(tmp_path)), target_language="xx_Latn"))
    with pytest.raises(ValueError, match=r"rewards.bilingual.source_language = 'fao_Latn': no language of"):
        Translator(BilingualConfig(path=str(tmp_path), source_language="fao_Latn"))
