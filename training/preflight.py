"""Checks that read files but load no model: paths, data, tokenizers, lengths. Each is a ValueError with the mend."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from configs.jsonl import iterate_jsonl, read_questions
from configs.schema import DEMO, RunConfig, require
from inference.checks import check_teacher
from inference.packing import Group
from training.data import Skipped, answer_group, load_prompts
from training.experience import Prompt
from training.extra_rewards import check_extra_rewards
from training.loop import Corpus
from training.text import TextBlocks, text_blocks
from training.validation import check_validation, question_key, set_aside


@dataclass(frozen=True)
class Inputs:
    """Everything read from files before a model is loaded."""

    corpus: Corpus
    heldout: list[Prompt]
    skipped: Skipped


def with_model_directories(config: RunConfig) -> RunConfig:
    """The configuration with each model's path as a local directory that holds a model (`demo` stays `demo`)."""

    def find(key: str, path: str) -> str:
        return path if path == DEMO else str(model_directory(key, path))

    critic = config.critic.path
    return replace(
        config,
        student=replace(config.student, path=find("student.path", config.student.path)),
        teacher=replace(config.teacher, path=find("teacher.path", config.teacher.path)),
        teachers=tuple(replace(t, path=find(f"teachers[{i}].path", t.path)) for i, t in enumerate(config.teachers)),
        critic=replace(config.critic, path=None if critic is None else find("critic.path", critic)),
    )


def check_files(config: RunConfig) -> None:
    """What can be said before the demo is built: JSONL syntax, tensor-parallel size."""
    check_extra_rewards(config)
    if config.teacher.path == DEMO:
        from training.demo_models import RECIPES

        heads = RECIPES[config.demo_size].teacher.heads
        require(
            heads % config.teacher.tensor_parallel == 0,
            "teacher.tensor_parallel",
            config.teacher.tensor_parallel,
            f"must divide the {heads} attention heads of the demo's teacher; use 1, 2 or 4",
        )
    else:
        check_teacher(Path(config.teacher.path), config.teacher.tensor_parallel)
    for place, extra in enumerate(config.teachers):
        if extra.path != DEMO:
            check_teacher(Path(extra.path), extra.tensor_parallel, f"teachers[{place}]")
    require(
        not config.student.adapter.four_bit or torch.cuda.is_available(),
        "student.adapter.four_bit",
        config.student.adapter.four_bit,
        "4-bit weights are sampled from on CUDA devices only; set it to False here",
    )
    data = config.data
    for key, path in (("data.prompts", data.prompts), ("data.warmup", data.warmup), ("data.heldout", data.heldout)):
        if path != DEMO:
            _named(key, lambda p=path: read_questions(p, answers=False))
    if data.validation is not None:
        _named("data.validation", lambda: read_questions(str(data.validation), answers=False))
    if config.data.text not in (None, DEMO):
        _named("data.text", lambda: deque(iterate_jsonl(str(config.data.text), ["text"]), maxlen=0))


def model_directory(key: str, path: str) -> Path:
    """The directory of a Hugging Face model with weights; a hub id is downloaded into the hub's cache first."""
    directory = Path(path).expanduser()
    if not directory.exists() and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        directory = _download(key, path)
    require(directory.is_dir(), key, path, "no such directory; give a Hugging Face model directory or a hub id")
    require(
        (directory / "config.json").is_file(), key, path, "no config.json in it; give a Hugging Face model directory"
    )
    require(bool(list(directory.glob("*.safetensors"))), key, path, "no weights (*.safetensors) in it")
    return directory


def _download(key: str, hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        raise ValueError(
            f"{key} = {hub_id!r}: no such directory, and the hub did not give it ({type(error).__name__}); "
            "give a local model directory, or log in where the model needs it"
        ) from None


def check_world(config: RunConfig, world: int) -> None:
    """Every rank needs a prompt for every optimizer step."""
    least = world * config.actor.updates_per_rollout
    require(
        config.prompts_per_step % world == 0 and config.prompts_per_step >= least,
        "prompts_per_step",
        config.prompts_per_step,
        f"must be a multiple of the {world} ranks, and at least {least} (ranks times actor.updates_per_rollout)",
    )


def context_length(model: str | Path) -> int | None:
    """Longest sequence that the model's config.json allows, or None where it does not say."""
    path = Path(model) / "config.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    values = values.get("text_config") or values
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(values.get(key), int):
            return int(values[key])
    return None


def room_for_prompt(config: RunConfig) -> int:
    """Longest prompt that leaves room for an answer in all models. Raises where there is none."""
    lengths = [n for n in map(context_length, _all_models(config)) if n is not None]
    room = min(lengths, default=2**30) - config.sampling.max_new_tokens
    require(
        room > 0,
        "sampling.max_new_tokens",
        config.sampling.max_new_tokens,
        f"leaves no room for a prompt in a context of {min(lengths, default=0)} tokens",
    )
    return room


def _all_models(config: RunConfig) -> list[str]:
    return [config.student.path, config.teacher.path, *(teacher.path for teacher in config.teachers)]


def load_inputs(config: RunConfig, tokenizer: Any, end_token: int) -> Inputs:
    """Prompts, held-out questions, L_PT text and L_BC examples as tokens. All paths are resolved by now."""
    room = room_for_prompt(config)
    data = config.data
    compared = config.rewards.exact_match_weight != 0 or config.rewards.similarity_weight != 0
    prompts, skipped = load_prompts(data.prompts, data, tokenizer, key="data.prompts", room=room, need_answers=compared)
    heldout, _ = load_prompts(data.heldout, data, tokenizer, key="data.heldout", room=room, need_answers=True)
    judged: list[Prompt] = []
    if config.eval.every > 0:
        judged, prompts = _validation(config, tokenizer, room, prompts, heldout)
    require(
        config.prompts_per_step <= len(prompts),
        "prompts_per_step",
        config.prompts_per_step,
        f"is more than the {len(prompts)} prompts in {data.prompts}",
    )
    text: Sequence[Sequence[Group]] = ()
    if config.pt_coef > 0:
        text = blocks_of(config, tokenizer, end_token)
        require(
            config.loss.pt_batch <= len(text), "loss.pt_batch", config.loss.pt_batch,
            f"is more than the {len(text)} blocks of text in {data.text}",
        )  # fmt: skip
    cloning = []
    if config.loss.bc_coef > 0 or config.phases.every > 0:
        warmup, _ = load_prompts(data.warmup, data, tokenizer, key="data.warmup", room=room, need_answers=True)
        kept_out = {question_key(p) for p in judged}
        warmup = [p for p in warmup if question_key(p) not in kept_out]
        cloning = [answer_group(p, p.answers[0], tokenizer, end_token) for p in warmup]
        require(
            config.loss.bc_batch <= len(cloning), "loss.bc_batch", config.loss.bc_batch,
            f"is more than the {len(cloning)} examples in {data.warmup}",
        )  # fmt: skip
    questions = heldout[: config.eval.questions] if config.eval.questions else heldout
    return Inputs(Corpus(prompts, text, cloning, judged), questions, skipped)


def _validation(
    config: RunConfig, tokenizer: Any, room: int, prompts: list[Prompt], heldout: list[Prompt]
) -> tuple[list[Prompt], list[Prompt]]:
    """(questions of the validation in the loop, RL prompts that are left)."""
    data = config.data
    if data.validation is None:
        cut = set_aside(prompts, heldout, config)
        return cut.validation, cut.prompts
    found, _ = load_prompts(
        data.validation, data, tokenizer, key="data.validation", room=room,
        need_answers=config.eval.metric != "reverse_kl",
    )  # fmt: skip
    found = found[: config.eval.validation_questions]
    check_validation(found, {"data.heldout": heldout, "data.prompts": prompts}, config)
    return found, prompts


def blocks_of(config: RunConfig, tokenizer: Any, end_token: int) -> TextBlocks:
    """L_PT's blocks, as configured; data.text is given and resolved by now."""
    data = config.data
    assert data.text is not None
    return text_blocks(
        data.text, tokenizer, end_token, data.text_block_tokens, cache=config.cache_dir,
        deduplicate=data.deduplicate, documents=data.text_packing == "documents",
    )  # fmt: skip


def with_paths(config: RunConfig, **paths: str) -> RunConfig:
    """The configuration with `demo` replaced by real paths (keys: student, teacher, prompts, warmup, heldout, text)."""

    def pick(value: str, key: str) -> str:
        return paths[key] if value == DEMO else value

    data = config.data
    return replace(
        config,
        student=replace(config.student, path=pick(config.student.path, "student")),
        teacher=replace(config.teacher, path=pick(config.teacher.path, "teacher")),
        teachers=tuple(replace(t, path=pick(t.path, "teacher")) for t in config.teachers),
        data=replace(
            data,
            prompts=pick(data.prompts, "prompts"),
            warmup=pick(data.warmup, "warmup"),
            heldout=pick(data.heldout, "heldout"),
            text=None if data.text is None else pick(data.text, "text"),
        ),
    )


def _named(key: str, read: Any) -> None:
    """Run a file check and put the configuration key in front of what it says."""
    try:
        read()
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
