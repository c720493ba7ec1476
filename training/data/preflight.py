"""Checks that read files but load no model: paths, data, tokenizers, lengths. Each is a ValueError with the mend."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig

from configs.checks import require
from configs.io.files import read_json
from configs.io.hub import as_started, base_of, find_model
from configs.io.jsonl import iterate_jsonl, read_open_questions, read_questions
from configs.io.loading import loading
from configs.models import DEMO_STAGE1
from configs.prompts import Format
from configs.schema import DEMO, RunConfig
from inference.attention.packing import Group
from inference.model.backend import check_teacher
from inference.model.files import context_of
from inference.model.files import model_directory as whole_model
from training.data.model_files import check_model_files
from training.data.overlap import folded
from training.data.prompts import answer_group, load_prompts
from training.data.text import TextBlocks, text_blocks
from training.experience import Corpus, Prompt
from training.objective import pt_coef
from training.run.launcher import environment_rank

if TYPE_CHECKING:
    from training.teacher.link import TeacherLink

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Everything read from files before a model is loaded."""

    corpus: Corpus
    heldout: list[Prompt]
    """Held-out questions, then the open ones."""

    @property
    def prompts(self) -> list[Prompt]:
        """All that the teachers are asked."""
        return [*self.corpus.prompts, *self.heldout, *self.corpus.validation]


def with_models(config: RunConfig, find: Callable[[str, str], str]) -> RunConfig:
    """The configuration with what `find` (of a key and its path) gives as the path of each model."""
    baseline = config.eval.baseline
    return replace(
        config,
        eval=replace(config.eval, baseline=None if baseline is None else find("eval.baseline", baseline)),
        student=replace(config.student, path=find("student.path", config.student.path)),
        teacher=replace(config.teacher, path=find("teacher.path", config.teacher.path)),
        teachers=tuple(replace(t, path=find(f"teachers[{i}].path", t.path)) for i, t in enumerate(config.teachers)),
    )


DEMOS = (DEMO, DEMO_STAGE1)


def with_model_directories(config: RunConfig) -> RunConfig:
    """The configuration with each model's path as a local directory that holds a model (`demo` stays `demo`)."""
    run = Path(config.runs_dir, config.run_name)
    served = {f"{key}.path" for key, teacher in config.every_teacher.items() if teacher.url is not None}

    def find(key: str, path: str) -> str:
        if path in DEMOS:
            return path
        return str(model_directory(key, as_started(run, key, path), weights=key not in served))

    return with_models(config, find)


def check_files(config: RunConfig) -> None:
    """What can be said before the demo is built: JSONL syntax, tensor-parallel size."""
    if config.teacher.path == DEMO:
        with loading():
            from training.data.demo.models import RECIPES

        heads, ranks = RECIPES[config.demo_size].teacher.heads, config.teacher.tensor_parallel
        mend = f"must divide the {heads} attention heads of the demo's teacher; use 1, 2 or 4"
        require(heads % ranks == 0, "teacher.tensor_parallel", ranks, mend)
    else:
        check_teacher(config.teacher)
    for place, extra in enumerate(config.teachers):
        if extra.path != DEMO:
            check_teacher(extra, f"teachers[{place}]")
    four_bit, data = config.student.adapter.four_bit, config.data
    mend = "4-bit weights are sampled from on CUDA devices only; set it to False here"
    require(not four_bit or torch.cuda.is_available(), "student.adapter.four_bit", four_bit, mend)
    questions = {"prompts": data.prompts, "warmup": data.warmup, "heldout": data.heldout, "validation": data.validation}
    for name, path in questions.items():
        if path not in (None, DEMO):
            with _named(f"data.{name}"):
                read_questions(str(path), answers=False)
    if data.open not in (None, DEMO):
        with _named("data.open"):
            read_open_questions(str(data.open))
    if data.text not in (None, DEMO):
        with _named("data.text"):
            deque(iterate_jsonl(str(data.text), ["text"]), maxlen=0)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Put the configuration key in front of what a check of its file says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def model_directory(key: str, path: str, *, weights: bool = True) -> Path:
    """The directory of a Hugging Face model whose files can be read, or all but its weights, where those are served
    elsewhere; or of an adapter of one. A hub id is downloaded into the hub's cache first. Raises ValueError."""
    directory = find_model(key, path, weights=weights)
    try:
        base = base_of(directory, weights=True)
    except ValueError as error:
        raise ValueError(f"{key} = {path!r}: {error}") from None
    check_model_files(key, whole_model(key, str(base), weights=weights), weights=weights)
    return directory


def check_world(config: RunConfig, world: int) -> None:
    """Every rank needs a prompt for every optimizer step."""
    prompts, least = config.prompts_per_step, world * config.actor.updates_per_rollout
    mend = f"must be a multiple of the {world} ranks, and at least {least} (ranks times actor.updates_per_rollout)"
    require(prompts % world == 0 and prompts >= least, "prompts_per_step", prompts, mend)


def check_interfaces(config: RunConfig, *, several_machines: bool) -> None:
    """A teacher that is started here listens where every rank can reach it."""
    mend = "only this machine reaches it, and the ranks are on several; name the address of rank 0's machine"
    for key, one in config.every_teacher.items():
        reached = not several_machines or one.address is not None or not one.interface.startswith(("127.", "localhost"))
        require(reached, f"{key}.interface", one.interface, mend)


def context_length(model: str | Path) -> int | None:
    """Longest sequence that the model's config.json allows, or None where it does not say."""
    path = base_of(model) / "config.json"
    if not path.is_file():
        return None
    values = read_json(path)
    return context_of(values.get("text_config") or values)


def room_for_prompt(config: RunConfig) -> int:
    """Longest prompt that leaves room for an answer in all models. Raises where there is none."""
    models = [config.student.path, *(teacher.path for teacher in config.every_teacher.values())]
    lengths = [n for n in map(context_length, models) if n is not None]
    shortest, answer = min(lengths, default=2**30), config.sampling.max_new_tokens
    mend = f"leaves no room for a prompt in a context of {shortest} tokens"
    require(answer < shortest, "sampling.max_new_tokens", answer, mend)
    return shortest - answer


def check_context(config: RunConfig, *, text: bool, examples: Sequence[Group] = ()) -> None:
    """Blocks of `text` and `examples` of data.warmup fit into the student's context. Raises ValueError."""
    context, block = context_length(config.student.path) or 2**30, config.data.text_block_tokens
    longest = max((len(one.prompt) + len(one.responses[0]) for one in examples), default=0)
    what = f"the {context} tokens of the context of student.path = {config.student.path!r}"
    require(not text or block <= context, "data.text_block_tokens", block, f"is more than {what}; lower it")
    mend = f"{longest} tokens, a prompt with its answer, are more than {what}; shorten that answer"
    require(longest <= context, "data.warmup", config.data.warmup, mend)


def check_output(config: RunConfig) -> None:
    """sft.output is replaced as a whole: only a model may be there, and none that is read. Raises ValueError."""
    output = config.sft.output
    if output is None or not Path(output).exists():
        return
    held = Path(output).is_file() or (any(Path(output).iterdir()) and not (Path(output) / "config.json").is_file())
    require(not held, "sft.output", output, "what is there is no model, and would be replaced; name a new folder")
    for key, model in (("student.path", config.student.path), ("teacher.path", config.teacher.path)):
        same = Path(model).exists() and Path(output).samefile(model)
        require(not same, "sft.output", output, f"is {key} itself, which would be replaced; name a new folder")


def check_room(named: str, asked: Format, context: int | None, config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """A teacher, `named` by its setting and value, has a template, tokens and words of its own around a prompt: it has
    to take every prompt, and they too have to leave room for an answer in its `context`. Raises ValueError where one is
    not taken, or is too long."""
    room = 2**30 if context is None else context - config.sampling.max_new_tokens
    before = len(asked.prompt("?"))
    for prompt in prompts:
        try:
            if before + len(asked.rendered(prompt.asked).encode()) < room:  # no token is less than a byte
                continue
            count = len(asked.prompt(prompt.asked))
        except ValueError as error:  # a chat template is a program, which may refuse some text
            raise ValueError(f"{named}: {error} for {prompt.text[:40]!r}") from None
        mend = (
            f"{named} needs {count} tokens for the prompt {prompt.text[:40]!r}, and its context of "
            f"{context} leaves {room} after sampling.max_new_tokens; lower that, or leave that prompt out"
        )
        require(count <= room, "data.max_prompt_tokens", config.data.max_prompt_tokens, mend)


def check_served_room(key: str, link: TeacherLink, config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """A server may have been started with less context than the model has. Raises ValueError."""
    served, of_model = link.client.info().max_positions, context_length(link.facts.path)
    if of_model is None or served < of_model:
        check_room(f"{key} = {str(link.facts.path)!r}, as it is served,", link.facts.teacher, served, config, prompts)


def load_inputs(config: RunConfig, asked: Format) -> Inputs:
    """Prompts, held-out questions, L_PT text and L_BC examples as tokens. All paths are resolved by now."""
    data, room = config.data, room_for_prompt(config)

    def load(name: str, need_answers: bool) -> list[Prompt]:
        return load_prompts(f"data.{name}", data, asked, room=room, need_answers=need_answers)

    prompts = load("prompts", False)
    blank, weight = sum(not prompt.answers for prompt in prompts), config.rewards.similarity_weight
    lack = f"compares with the data's answers, which {blank} of {len(prompts)} rows of {data.prompts} lack; set it to 0"
    require(weight == 0 or not blank, "rewards.similarity_weight", weight, lack)
    heldout = load("heldout", True)
    open_questions = load("open", False) if data.open is not None else []
    judged: list[Prompt] = []
    if config.eval.every > 0 and data.validation is None:
        judged, prompts = set_aside(prompts, heldout, config)
    elif config.eval.every > 0:
        judged = load("validation", config.eval.metric != "reverse_kl")[: config.eval.validation_questions]
        check_validation(judged, {"data.heldout": heldout, "data.prompts": prompts}, config)
    _enough("prompts_per_step", config.prompts_per_step, len(prompts), f"prompts in {data.prompts}")
    text: TextBlocks | tuple[()] = ()
    if pt_coef(config) > 0:
        text = text_blocks(data, asked, config.cache_dir)
        if len(text) < config.loss.pt_batch and environment_rank() == 0:
            said = "loss.pt_batch = %d: data.text = %r has %d blocks of data.text_block_tokens; each step takes all"
            log.warning(said, config.loss.pt_batch, data.text, len(text))
    cloning = []
    if config.loss.bc_coef > 0 or config.phases.every > 0:
        kept_out = {question_key(prompt) for prompt in judged}
        warmup = [prompt for prompt in load("warmup", True) if question_key(prompt) not in kept_out]
        cloning = [answer_group(prompt, prompt.answers[0], asked) for prompt in warmup]
        _enough("loss.pt_batch", config.loss.pt_batch, len(cloning), f"examples in {data.warmup}")
    check_context(config, text=pt_coef(config) > 0, examples=cloning)
    every = (*prompts, *heldout, *open_questions, *judged)
    tokens = [*(prompt.tokens for prompt in every), *(group.responses[0] for group in cloning)]
    check_vocabulary("student.path", config.student.path, asked, tokens, text)
    most = config.eval.questions or None
    return Inputs(Corpus(prompts, text, cloning, judged), [*heldout[:most], *open_questions[:most]])


def check_vocabulary(
    key: str,
    path: str | Path,
    asked: Format,
    tokens: Iterable[Sequence[int]],
    text: TextBlocks | tuple[()] = (),
) -> None:
    """Every token has a row in the embedding of the model `path` of setting `key`: a tokenizer may have grown without
    its model. Only where it has are the `tokens` and all of the raw `text` looked through. Raises ValueError."""
    rows = AutoConfig.from_pretrained(base_of(path)).get_text_config().vocab_size
    if max([asked.end, *asked.tokenizer.get_vocab().values()]) < rows:
        return
    highest = max([asked.end, *(max(one, default=0) for one in tokens), text.highest if text else 0])
    require(
        highest < rows, key, str(path),
        f"its tokenizer gives token {highest}, and the model has {rows} rows; resize its embedding "
        "(model.resize_token_embeddings), or take the tokenizer that it was trained with",
    )  # fmt: skip


def _enough(key: str, wanted: int, count: int, what: str) -> None:
    require(wanted <= count, key, wanted, f"is more than the {count} {what}")


# --- the validation in the loop ------------------------------------------------------------------------------------


def set_aside(
    prompts: Sequence[Prompt], heldout: Sequence[Prompt], config: RunConfig
) -> tuple[list[Prompt], list[Prompt]]:
    """`eval.validation_questions` of the RL prompts, evenly spaced over the file, none of them a held-out question; and
    all other prompts, without repetitions of those. Raises ValueError."""
    asked = {question_key(prompt) for prompt in heldout}
    needs_answers = config.eval.metric != "reverse_kl"
    fit = [p for p in prompts if question_key(p) not in asked and (p.answers or not needs_answers)]
    count = config.eval.validation_questions
    with_answers = f" with answers (eval.metric = {config.eval.metric!r} needs them)" if needs_answers else ""
    mend = f"{with_answers}; set fewer aside, or give a file in data.validation"
    more = f"is more than half of the {len(fit)} RL prompts{mend}"
    require(count <= len(fit) // 2, "eval.validation_questions", count, more)
    chosen = [fit[len(fit) * i // count] for i in range(count)]
    taken = {question_key(prompt) for prompt in chosen}
    return chosen, [prompt for prompt in prompts if question_key(prompt) not in taken]


def check_validation(validation: Sequence[Prompt], others: dict[str, Sequence[Prompt]], config: RunConfig) -> None:
    """Questions of `data.validation` are in no other file. `others`: by key. Raises ValueError."""
    keys = {question_key(prompt): prompt for prompt in validation}
    for name, prompts in others.items():
        shared = [keys[key] for key in dict.fromkeys(question_key(prompt) for prompt in prompts) if key in keys]
        if shared:
            raise ValueError(
                f"data.validation = {config.data.validation!r}: {len(shared)} of {len(keys)} questions are in {name} "
                f"too, the first: {shared[0].question[:80]!r}; leave them out there, or leave data.validation out to "
                "have RL prompts set aside"
            )


def question_key(prompt: Prompt) -> str:
    """What makes two questions one, but for case and white space: context and turns before it count."""
    return folded(prompt.text)
