"""Greedy answers of a Hugging Face model to held-out questions, and their SQuAD scores."""

from __future__ import annotations

import hashlib
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from rewards.answers import exact_match, score_answers, token_f1

Question = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AskSettings:
    """How the questions are put; from the config.yaml of the run, so that stage 3 asks as stage 2 did."""

    template: str
    """How a question becomes a prompt."""
    context_template: str
    """How a question with a context becomes a prompt."""
    max_prompt_tokens: int
    """Longer prompts are counted and skipped."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    questions: int | None
    """Questions asked, of those that fit. None: all."""
    batch: int
    """Questions answered at a time."""
    dtype: str
    """Parameter and compute type of the model."""
    use_chat_template: bool = False
    """The prompt is a user's message in the model's own chat template."""

    def prompt(self, question: Question) -> str:
        """The text that the model goes on from."""
        # Replaced, not formatted: braces in a template or a context are only text (as in training/data.py).
        template = self.context_template if question.get("context") else self.template
        return template.replace("{context}", question.get("context") or "").replace("{question}", question["question"])


@dataclass(frozen=True, kw_only=True)
class Exam:
    """A loaded model with the questions that it can be asked."""

    model: Any
    """Hugging Face causal language model, in evaluation mode on its device."""
    tokenizer: Any
    """Its tokenizer."""
    model_dir: Path
    """Where both were read from."""
    prompts: list[list[int]]
    """Token ids of each prompt that fits."""
    questions: list[Question]
    """The questions of those prompts."""
    skipped: int
    """Questions whose prompt is too long."""


def load_exam(model_dir: Path, questions: list[Question], settings: AskSettings) -> Exam:
    """Load a model and tokenise its prompts; ValueError where that cannot be."""
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=getattr(torch, settings.dtype), local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # half-written files raise nearly anything (safetensors: a class of its own)
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{model_dir}: the model cannot be loaded ({type(error).__name__}: {reason})") from error
    prompts = [_prompt_tokens(tokenizer, settings, question) for question in questions]
    longest = _longest_prompt(model, settings)
    kept = [index for index, prompt in enumerate(prompts) if len(prompt) <= longest]
    if not kept:
        raise ValueError(
            f"data.max_prompt_tokens: every prompt is longer than {longest} tokens (the shortest has "
            f"{min(map(len, prompts))}); raise it in the run's config.yaml, or shorten the contexts"
        )
    skipped = len(questions) - len(kept)
    kept = kept[: settings.questions]
    return Exam(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        model_dir=model_dir,
        prompts=[prompts[index] for index in kept],
        questions=[questions[index] for index in kept],
        skipped=skipped,
    )


def score_exam(exam: Exam, data: Path, settings: AskSettings) -> dict[str, Any]:
    """Ask every question greedily; the content of eval/heldout.json."""
    start = time.monotonic()
    replies = greedy_replies(exam, settings)
    return {
        "judge": "SQuAD token F1 and exact match, in percent, of greedy answers (not EuroEval)",
        **score_answers(replies, [question["answers"] for question in exam.questions]),
        "questions": len(exam.questions),
        "skipped_too_long": exam.skipped,
        "model": str(exam.model_dir),
        "data": str(data),
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "device": str(exam.model.device),
        "seconds": round(time.monotonic() - start, 3),
        "answers": [_answer_row(question, reply) for question, reply in zip(exam.questions, replies, strict=True)],
    }


@torch.inference_mode()
def greedy_replies(exam: Exam, settings: AskSettings) -> list[str]:
    """The model's answer to each prompt: likeliest token each time, up to its end or max_new_tokens.

    The whole answer is given back, stripped; a model that does not stop is not helped by cutting at a new line.
    """
    model, tokenizer, prompts = exam.model, exam.tokenizer, exam.prompts
    label = exam.model_dir.parent.name if exam.model_dir.name == "export" else exam.model_dir.name
    ends = _end_ids(model, tokenizer)
    # What pads is never seen: it is masked on the left, and cut off behind the end of an answer.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    # A configuration of our own: those of published models often switch sampling or penalties on.
    generation = GenerationConfig(
        do_sample=False, max_new_tokens=settings.max_new_tokens, pad_token_id=pad, eos_token_id=sorted(ends) or None
    )
    replies = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # like lengths together: little padding
    with tqdm(total=len(prompts), desc=label, unit="question", dynamic_ncols=True) as bar:
        for start in range(0, len(order), settings.batch):
            indices = order[start : start + settings.batch]
            ids, mask = _pad_left([prompts[index] for index in indices], pad)
            # `generate` makes the position ids from the mask, so that every prompt starts at position 0.
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=generation
            )
            for index, row in zip(indices, output[:, ids.shape[1] :].tolist(), strict=True):
                end = next((position for position, token in enumerate(row) if token in ends), len(row))
                replies[index] = tokenizer.decode(row[:end], skip_special_tokens=True).strip()
            bar.update(len(indices))
    return replies


def _pad_left(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, [prompts, longest], int64; the mask comes from the lengths, never from the pad id."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: the tokenizer's and the model's (chat models have several)."""
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    return {end for end in ends | {tokenizer.eos_token_id} if end is not None}


def _prompt_tokens(tokenizer: Any, settings: AskSettings, question: Question) -> list[int]:
    text = settings.prompt(question)
    if not settings.use_chat_template:
        return list(tokenizer(text)["input_ids"])
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def _longest_prompt(model: Any, settings: AskSettings) -> int:
    """Longest prompt, in tokens, that leaves room for an answer."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = settings.max_prompt_tokens if context is None else context - settings.max_new_tokens
    return min(settings.max_prompt_tokens, room)


def _answer_row(question: Question, reply: str) -> dict[str, Any]:
    """One question with what was said and how right it was, in percent."""
    kept = {key: question[key] for key in ("id", "question", "context", "answers") if question.get(key) is not None}
    f1, match = 100.0 * token_f1(reply, question["answers"]), 100.0 * exact_match(reply, question["answers"])
    return {**kept, "prediction": reply, "f1": f1, "exact_match": match}
