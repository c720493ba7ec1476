"""`training/main.py --plan`: from configuration and config.json alone, how much memory a run needs on how many cards.

    python training/main.py --plan --config configs/llama2_70b_llama2_7b.yaml --student.path DIR --teacher.path DIR

No launcher, no GPU, no weights: a model directory needs nothing but its config.json. docs/planning.md says how to read
what is printed and how far it is from measured memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.checks import require
from configs.io.hub import has_tokenizer
from configs.schema import DEMO, RunConfig, TeacherConfig
from inference.model.families import Architecture, parse_architecture
from inference.model.files import model_directory, tensor_parallel_sizes
from inference.protocol.fingerprint import tokenizer_fingerprint
from training.algorithms import ALGORITHMS
from training.data.preflight import room_for_prompt, with_models
from training.run.choices import check_choices
from training.tools.plan_rank import ModelFacts, RankMemory, Tracer, alternatives, rank_memory
from training.tools.plan_teacher import TeacherMemory, plain_weights, teacher_memory

GB = 10**9
CARDS = (40, 80, 141)
"""Card sizes, GB."""
RESERVE_BYTES, RESERVE_SHARE = 2 * GB, 0.05
"""Left free on each card: CUDA context and NCCL's buffers, and a share for the allocator's fragmentation."""


def plan(config: RunConfig) -> int:
    """Print the plan; returns the exit code. Raises ValueError naming key, value and mend."""
    check_choices(config)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config, facts, notes = read_models(config)
    tracer = Tracer(facts, config.student)
    print("\n".join(report(config, tracer, notes)), flush=True)
    return 0


def read_models(config: RunConfig) -> tuple[RunConfig, ModelFacts, list[str]]:
    """The configuration with local paths, what its models' config.json say, and remarks for the reader."""
    from transformers import AutoConfig

    def found(key: str, path: str) -> str:
        require(path != DEMO, key, path, "the demo is built when a run starts; give a Hugging Face model directory")
        return str(model_directory(key, path, weights=False))

    config = with_models(replace(config, eval=replace(config.eval, baseline=None)), found)

    def text_config(key: str, path: str) -> Any:
        try:
            return AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{key}.path = {path!r}: {' '.join(str(error).split())}") from None

    student = text_config("student", config.student.path)
    _check_causal("student", config.student.path, student)
    described = {key: (one, text_config(key, one.path)) for key, one in config.every_teacher.items()}
    (_, _, teacher), *others = [(key, one, _served(key, one, text)) for key, (one, text) in described.items()]
    same, how = _same_tokenizer(config, student.vocab_size == teacher.vocab_size)
    notes = [f"tokenizers: taken as {'equal' if same else 'different'} ({how})"]
    if config.student.adapter.four_bit:
        notes.append("student.adapter.four_bit: the frozen weights are counted in student.dtype, not in 4 bits")
    prompt = min(config.data.max_prompt_tokens, room_for_prompt(config))
    return config, ModelFacts(student, teacher, same, prompt, tuple(others)), notes


def _served(key: str, teacher: TeacherConfig, described: Any) -> Architecture | Any:
    """Megatron's architecture where that backend serves the model, else transformers' configuration."""
    try:
        if teacher.backend != "transformers":
            return parse_architecture(described.to_dict())
    except ValueError as error:
        if teacher.backend == "megatron":
            raise ValueError(f"{key}.path = {teacher.path!r}: {error}; set {key}.backend to auto") from None
    _check_causal(key, teacher.path, described)
    return described


def _check_causal(key: str, path: str, described: Any) -> None:
    """Raises ValueError where transformers makes no causal language model of a configuration."""
    from transformers import AutoModelForCausalLM

    if type(described) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{key}.path = {path!r}: model_type = {described.model_type!r} is no causal language model")


def _same_tokenizer(config: RunConfig, same_size: bool) -> tuple[bool, str]:
    """Whether student tokens are teacher tokens, and how that is known."""
    paths = [Path(config.student.path), Path(config.teacher.path)]
    if all(map(has_tokenizer, paths)):
        return tokenizer_fingerprint(paths[0]) == tokenizer_fingerprint(paths[1]), "compared"
    return same_size, "no tokenizer files: by the size of the vocabularies"


def usable(card: int) -> float:
    """Bytes that a plan may use of a card."""
    return card * GB * (1 - RESERVE_SHARE) - RESERVE_BYTES


def world_sizes(config: RunConfig) -> list[int]:
    """Numbers of trainer ranks that share the prompts evenly, each with one for every optimizer step."""
    prompts = config.prompts_per_step
    return [w for w in range(1, prompts + 1) if prompts % w == 0 and prompts // w >= config.actor.updates_per_rollout]


def fewest_cards(config: RunConfig, tracer: Tracer, card: int) -> float:
    """Fewest cards for the trainer as it is configured; infinitely many where no number is enough."""
    fits = (w for w in world_sizes(config) if rank_memory(config, tracer, w).total <= usable(card))
    return next(fits, math.inf)


def fewest_with_changes(config: RunConfig, tracer: Tracer, card: int) -> tuple[float, str]:
    """The change of settings that needs fewest cards, of equals the first, which changes least: (cards, settings).
    Offload only where nothing else is enough."""
    for offload in (False, True):
        tried = [(fewest_cards(c, tracer, card), said) for said, c in alternatives(config, offload=offload)]
        best = min(tried, key=lambda one: one[0])
        if best[0] < math.inf:
            break
    return best


def smallest_teacher(config: RunConfig, facts: ModelFacts, card: int) -> float:
    """Fewest cards for the first teacher, which is its tensor-parallel size (infinitely many where none is enough); for
    the weights alone of one that transformers runs."""
    if not isinstance(facts.teacher, Architecture):
        return math.ceil(plain_weights(facts.teacher, config.teacher.dtype) / usable(card))
    for size in tensor_parallel_sizes(facts.teacher.heads):
        if teacher_memory(facts.teacher, config, size, facts.prompt_tokens).total <= usable(card):
            return size
    return math.inf


def report(config: RunConfig, tracer: Tracer, notes: Sequence[str]) -> list[str]:
    """The page, line by line."""
    facts = tracer.facts
    algorithms = {name: replace(config, algo=name) for name in ALGORITHMS}
    worlds = [w for w in world_sizes(config) if w & (w - 1) == 0]
    shown = max(w for w in worlds if w <= 8)
    ranks = {(name, w): rank_memory(c, tracer, w) for name, c in algorithms.items() for w in worlds}
    lines = [
        f"student {tracer.student.total / 1e6:,.1f} million parameters, {tracer.student.trainable / 1e6:,.1f} trained; "
        f"{config.student.dtype}, ZeRO {config.actor.zero_stage} (critic {config.critic.zero_stage}), "
        f"gradient checkpointing {'on' if config.student.gradient_checkpointing else 'off'}, "
        f"offload {'on' if config.actor.offload else 'off'}",
        f"each step {config.prompts_per_step} prompts of {facts.prompt_tokens} tokens, {config.sampling.group_size} "
        f"responses of {config.sampling.max_new_tokens} to each: every text is taken at its longest",
        *notes,
        "",
        f"One trainer rank of {shown}, GB (10^9 bytes)",
        *_parts_table({name: ranks[name, shown] for name in algorithms}),
        "",
        "One trainer rank, by number of ranks, GB",
        _line("ranks", [str(w) for w in worlds]),
        *(_line(n.upper(), [_gb(ranks[n, w].total) for w in worlds]) for n in algorithms),
        *(_line(f"{n.upper()}, host memory", [_gb(ranks[n, w].host) for w in worlds]) for n in algorithms
          if ranks[n, worlds[0]].host),
        "",
        *_teacher_table(config, "teacher", facts.teacher, facts.prompt_tokens),
        "",
        *(line for key, one, shape in facts.others
          for line in (*_teacher_table(replace(config, teacher=one), key, shape, facts.prompt_tokens), "")),
        *_cards_table(config, tracer),
    ]  # fmt: skip
    return lines


def _gb(size: int) -> str:
    digits = 0 if size >= 100 * GB else 2 if size >= GB / 10 else 4
    return f"{size / GB:.{digits}f}"


def _line(name: str, cells: Sequence[str], width: int = 34) -> str:
    return "  " + name.ljust(width) + "".join(cell.rjust(10) for cell in cells)


def _parts_table(columns: dict[str, RankMemory]) -> list[str]:
    """Parts that stay, moments on top of them (the worst one counts), total."""
    lines = [_line("", [name.upper() for name in columns])]
    for kind, heading in (("static", ""), ("moments", "during ")):
        names = list(dict.fromkeys(name for rank in columns.values() for name in getattr(rank, kind)))
        for name in names:
            cells = [getattr(rank, kind).get(name) for rank in columns.values()]
            lines.append(_line(heading + name, ["-" if cell is None else _gb(cell) for cell in cells], 46))
    lines[0] = _line("", [name.upper() for name in columns], 46)
    lines.append(_line("total (all parts and the largest phase)", [_gb(r.total) for r in columns.values()], 46))
    return lines


def _teacher_table(config: RunConfig, key: str, shape: Architecture | Any, prompt_tokens: int) -> list[str]:
    """One rank of the teacher of settings `key` by tensor-parallel size; one line for what transformers runs."""
    if not isinstance(shape, Architecture):
        weights = _gb(plain_weights(shape, config.teacher.dtype))
        return [
            f"{key}: transformers runs it ({shape.model_type}, {config.teacher.dtype}), in one process: {weights} GB of"
            f" weights, dealt by whole layers to {key}.tensor_parallel cards; what its passes take is not planned"
        ]
    sizes = tensor_parallel_sizes(shape.heads)[:5]
    found: list[TeacherMemory] = [teacher_memory(shape, config, s, prompt_tokens) for s in sizes]
    rows = ("weights", "activations", "logits", "cache", "total")
    return [
        f"One rank of {key} by tensor-parallel size ({shape.family}, {config.teacher.dtype}), GB",
        _line("tensor parallel", [str(s) for s in sizes]),
        *(_line(row, [_gb(getattr(memory, row)) for memory in found]) for row in rows),
    ]


def _cards_table(config: RunConfig, tracer: Tracer) -> list[str]:
    """Smallest numbers of cards."""
    lines = [
        f"Fewest cards ({RESERVE_BYTES / GB:.0f} GB and {RESERVE_SHARE:.0%} of each left free for CUDA, NCCL and "
        "fragmentation)",
        _line("card", ["trainer", "teacher", "together"], 20),
    ]
    for card in CARDS:
        teacher = smallest_teacher(config, tracer.facts, card)
        for name in ALGORITHMS:
            chosen = replace(config, algo=name)
            need, (fewer, settings) = fewest_cards(chosen, tracer, card), fewest_with_changes(chosen, tracer, card)
            cells = ["none" if n == math.inf else str(n) for n in (need, teacher, need + teacher)]
            remark = f"   trainer {fewer} with {settings}" if fewer < need else ""
            lines.append(_line(f"{card} GB, {name.upper()}", cells, 20) + remark)
    plain = "" if isinstance(tracer.facts.teacher, Architecture) else ", for its weights alone"
    more = f"; the {len(config.teachers)} in teachers come on top" if config.teachers else ""
    lines.append(f"  teacher: its number is its tensor-parallel size (--teacher.tensor_parallel){plain}{more}")
    return lines
