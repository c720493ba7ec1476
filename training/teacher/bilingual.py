"""The `bilingual` part of the reward: the answer's English translation, scored by the teacher under an English prompt.

The translator is a frozen model of transformers beside the student, an encoder-decoder or a causal one, which answers
greedily and in batches. The prompt is the row's `question_en` (and `context_en`), or a translation of the question and
context where the row has none; each text of the data is translated once in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from configs.checks import require
from configs.learning import BilingualConfig
from inference.attention.packing import groups_of
from inference.protocol.fingerprint import load_tokenizer
from training.experience import Prompt, Rollout
from training.teacher.link import TeacherLink

KEY = "rewards.bilingual"


class Translator:
    """From Faroese into English."""

    def __init__(self, config: BilingualConfig, device: torch.device | str = "cpu") -> None:
        assert config.path is not None
        self._config = config
        described = AutoConfig.from_pretrained(config.path)
        self._causal = not described.is_encoder_decoder
        self._room = getattr(described.get_text_config(), "max_position_embeddings", None)
        """Tokens of a text that it reads; None: any number."""
        kind = AutoModelForCausalLM if self._causal else AutoModelForSeq2SeqLM
        model = kind.from_pretrained(config.path, dtype=torch.float32, use_safetensors=True)
        model.generation_config = symbols_alone(model.generation_config)
        self._model = model.to(device).eval().requires_grad_(False)
        self._tokenizer: Any = deepcopy(load_tokenizer(config.path))
        if self._causal:
            self._tokenizer.padding_side = self._tokenizer.truncation_side = "left"  # the last token is gone on from
            self._room = None if self._room is None else self._room - config.max_new_tokens
        self._options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": config.max_new_tokens}
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if config.source_language is not None:
            self._speak(config.source_language)
        if config.target_language is not None:
            token = self._tokenizer.convert_tokens_to_ids(config.target_language)
            known = token is not None and token != self._tokenizer.unk_token_id
            require(known, f"{KEY}.target_language", config.target_language, f"no token of {config.path}'s tokenizer")
            self._options["forced_bos_token_id"] = token
        self._kept: dict[str, str] = {}

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Their translations, stripped; of a causal model the first line. An empty text stays empty, and of one that is
        longer than the model's context the end (of a causal model's prompt the beginning) is not read."""
        wanted = sorted({text for text in texts if text.strip()}, key=lambda text: (len(text), text))
        found: dict[str, str] = {}
        for begin in range(0, len(wanted), self._config.batch):
            chunk = wanted[begin : begin + self._config.batch]
            found |= dict(zip(chunk, self._batch(chunk), strict=True))
        return [found.get(text, "") for text in texts]

    def kept(self, text: str) -> str:
        """The translation of a text of the data, asked for once."""
        if text not in self._kept:
            (self._kept[text],) = self([text])
        return self._kept[text]

    def _speak(self, language: str) -> None:
        """Tell the tokenizer of its source language. Raises ValueError where it does not know it, or any."""
        knows = hasattr(self._tokenizer, "src_lang")
        try:
            self._tokenizer.src_lang = language
            knows = knows and self._tokenizer.unk_token_id not in self._tokenizer("")["input_ids"]
        except (KeyError, ValueError):  # each tokenizer has its own way to say so
            knows = False
        require(knows, f"{KEY}.source_language", language, f"no language of {self._config.path}'s tokenizer")

    @torch.no_grad()
    def _batch(self, texts: Sequence[str]) -> list[str]:
        asked = [self._config.instruction.replace("{text}", text) for text in texts]
        cut = {} if self._room is None else {"truncation": True, "max_length": self._room}
        inputs = self._tokenizer(asked, return_tensors="pt", padding=True, **cut).to(self._model.device)
        inputs.pop("token_type_ids", None)
        out = self._model.generate(**inputs, **self._options)
        if self._causal:
            out = out[:, inputs["input_ids"].shape[1] :]
        written = [text.strip() for text in self._tokenizer.batch_decode(out, skip_special_tokens=True)]
        return [text.split("\n", 1)[0].strip() for text in written] if self._causal else written


def symbols_alone(own: GenerationConfig) -> GenerationConfig:
    """What a model's generation_config.json says of its symbols, without how it would have its answers sampled or
    penalised: transformers mixes that into every call."""
    names = ("bos", "eos", "pad", "decoder_start", "forced_bos", "forced_eos")
    kept = {f"{name}_token_id": getattr(own, f"{name}_token_id", None) for name in names}
    return GenerationConfig(**kept, bad_words_ids=own.bad_words_ids)  # Marian: padding is no word


class Bilingual:
    """Translator and teacher together."""

    def __init__(self, config: BilingualConfig, translate: Translator, link: TeacherLink) -> None:
        self._config = config
        self._translate = translate
        self._link = link

    def ask(self, rollout: Rollout) -> Callable[[], torch.Tensor]:
        """Translate, and send the translations to the teacher; call the result to wait for float32 [B] scores. What the
        teacher has no room for is cut off: of a translation its end beyond half of the room, of a prompt its
        beginning."""
        facts, texts = self._link.facts, self._translate(rollout.texts_B)
        room = self._link.client.info().max_positions
        plain = replace(facts.teacher, kind="plain", parsed=self._config.template)
        read = [(*plain.answer(text), plain.end) if text else (plain.end,) for text in texts]
        read = [tokens[: room // 2] for tokens in read]
        english = [self.prompt(prompt) for prompt in rollout.prompt_of_response()]
        prompts = [plain.prompt(prompt)[-(room - len(tokens)) :] for prompt, tokens in zip(english, read, strict=True)]
        future = self._link.client.score(groups_of(prompts, read, 1))
        return lambda: translated_scores(future.result(), [len(tokens) for tokens in read])

    def prompt(self, prompt: Prompt) -> str:
        """The English prompt of a question."""
        question = prompt.question_en or self._translate.kept(prompt.question)
        asked = self._config.template.replace("{question}", question)
        context = prompt.context_en or (self._translate.kept(prompt.context) if prompt.context else "")
        return f"Text: {context}\n{asked}" if prompt.context else asked


def translated_scores(logprobs_S: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """float32 [B] the teacher's mean log-probability of a token of each translated answer, nats, at most 0.

    `logprobs_S`: float32 [S] log p_T(token | English prompt, tokens before it) of all translations end to end, each
    with its end symbol; `lengths`: tokens of each. The mean, so that a long translation is not worse for its length.
    """
    return (
        torch.stack([part.mean() for part in logprobs_S.split(list(lengths))]) if lengths else logprobs_S.new_zeros(0)
    )
