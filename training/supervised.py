"""Stages 0 and 1: before it learns by reinforcement, the student learns from raw text and from answers.

Both begin alike (`run_stage`) and take the same steps (`train`) in the same engine as stage 2; steps, batch (over all
ranks), learning rate and output are those of `sft` in the configuration.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from configs.checks import names_setting, require
from configs.io.files import fingerprint, locked, read_json, write_atomically
from configs.io.results import Result, Value, versions
from configs.prompts import Format
from configs.schema import RunConfig
from inference.attention.packing import Group
from training import distributed
from training.data.demo.resolve import resolve_demo
from training.data.order import items_of_step, share_of_rank
from training.data.overlap import data_warnings
from training.data.preflight import (
    check_context,
    check_files,
    check_output,
    check_room,
    check_served_room,
    check_vocabulary,
    context_length,
    room_for_prompt,
    with_model_directories,
)
from training.data.prompts import answer_group, format_of, load_prompts
from training.data.text import TextBlocks, flat, text_blocks
from training.evaluation import evaluate
from training.experience import Prompt
from training.losses import Head
from training.objective import SUPERVISED, LossWeights, UpdateInput
from training.run import launcher
from training.run.boards import board_names
from training.run.card import Scores, publish
from training.run.cli import fail
from training.run.console import quiet_logging
from training.run.resuming import OpenRun, check_settings, open_run
from training.run.run_folder import RunFolder
from training.run.stopping import StopRequest
from training.run.supervisor import Supervisor, lowered
from training.stage2 import evaluation_once
from training.student.actor import Actor
from training.student.deepspeed_engine import start_distributed
from training.student.export import export
from training.student.passes import each_token
from training.teacher.connect import check_served_model, connect, find_teacher
from training.teacher.facts import TeacherFacts, check_tokenizers, teacher_facts
from training.teacher.link import TeacherLink
from training.teacher.token_bytes import TokenBytes

Inputs = TypeVar("Inputs")
Item = TypeVar("Item")
log = logging.getLogger(__name__)
HELD_OUT_EVERY = 20
"""Blocks of raw text of which one is held out."""
KEEP_S = 30.0
"""Seconds between two writings of the teacher's answers: all of them are one file."""


class Ended(Exception):
    """The stage has ended before its last step, with a checkpoint."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code
        """Exit code."""


@dataclass(frozen=True)
class Stage:
    """A stage that has begun."""

    number: int
    config: RunConfig
    """All paths are resolved."""
    asked: Format
    run: OpenRun
    stop: StopRequest
    supervisor: Supervisor

    def new_actor(self, teacher: TeacherFacts | None = None) -> Actor:
        """The student as the stage begins; with a teacher it can be compared with its whole distribution."""
        torch.manual_seed(self.config.seed)
        sft, head = self.config.sft, teacher.head() if teacher else None
        return Actor(self.config, total_steps=sft.steps, learning_rate=sft.learning_rate, teacher_head=head)

    def finish(self, results: Mapping[str, Any], how: str, scores: Scores, data: str | None) -> None:
        """Write the export's card, upload it where that is asked for, and write summary.json. Collective."""
        self.supervisor.finished(self.config.sft.steps)
        if distributed.is_main():
            export = exported(self.config, self.run.folder)
            publish(export, self.config, f"{how}, {self.config.sft.steps} steps", scores, [data])
            self.run.folder.write_json(
                "summary.json", {"status": "finished", "steps": self.config.sft.steps, **results}
            )
            self.run.folder.boards.close()


def run_stage(
    number: int,
    config: RunConfig,
    read: Callable[[RunConfig, Format], Inputs],
    learn: Callable[[Stage, Inputs], str],
) -> int:
    """Stage 0 or 1, from a checked configuration to its summary; returns the exit code.

    `read` gets the configuration with all paths resolved and how the student is asked, and gives what is learnt from
    (ValueError: a mistake in the input). `learn` trains, and returns the line that the stage ends with.
    """
    stop = StopRequest()
    launcher.watch_launcher()
    quiet_logging()
    try:
        launcher.check_launcher()
        boards = board_names(config.report_to)
        config = with_model_directories(config)
        check_output(config)
        check_files(config)
        launcher.set_threads(config.threads)
        config = resolve_demo(config, stage=number)
        asked = format_of("student", config.student, config.data)
        inputs = read(config, asked)
        folder = RunFolder(Path(config.runs_dir) / config.run_name, boards)
        check_settings(folder, config, number)
        config = lowered(config, folder.path)
        summary = folder.read_json("summary.json") or {}
    except (ValueError, OSError) as error:
        fail(str(error))
    done = summary.get("status") == "finished" and summary["steps"] >= config.sft.steps
    if done and exported(config, folder).is_dir():
        if launcher.environment_rank() == 0:
            print(f"stage {number} was finished already; choose another --name for a new run", flush=True)
        return 0
    supervisor = Supervisor(config, folder.path, stop)

    def work() -> int:
        start_distributed(config.stuck_timeout_s)
        try:
            run = open_run(folder, config, {"student": config.actor.zero_stage}, number)
        except ValueError as error:
            fail(str(error))
        try:
            line = learn(Stage(number, config, asked, run, stop, supervisor), inputs)
        except Ended as ended:
            return ended.code
        except ValueError as error:
            if not names_setting(config, error):
                raise
            fail(str(error))
        if distributed.is_main():
            print(f"stage {number}: {line}", flush=True)
        return 0

    return supervisor.run(work)


def exported(config: RunConfig, folder: RunFolder) -> Path:
    """Directory of the trained model."""
    return Path(config.sft.output) if config.sft.output else folder.export


def train(
    stage: Stage, actor: Actor, items: Sequence[Item], learnt: Callable[[list[Item]], UpdateInput], term: str
) -> dict[str, float]:
    """sft.steps optimizer steps on this rank's share of `items`, from the newest checkpoint on, logged by step, and the
    export; the steps' seconds. Raises Ended behind a last checkpoint where that is asked for, or where too many updates
    in a row were skipped. Collective.

    `learnt` makes the update of a step's items; `term` is the loss that the bar shows.
    """
    config, run, parts = stage.config, stage.run, {"student": actor.engine}
    progress = run.load(parts)
    bar = tqdm(
        range(progress.step, config.sft.steps),
        total=config.sft.steps,
        initial=progress.step,
        desc=f"stage {stage.number}",
        unit="step",
        disable=not distributed.is_main(),
    )
    points = stage.supervisor.watch(progress.step)
    stage.stop.defer()
    skipped_in_a_row, stopping, gave_up = 0, False, False
    for step in bar:
        points.begin(step)
        points.enter("update")
        mine = items_of_step(items, config.sft.batch, step, config.seed)
        metrics = actor.update([learnt(mine)], step) | points.seconds()
        progress.seconds["total"] = progress.seconds.get("total", 0.0) + metrics["seconds/total"]
        progress.step, progress.skipped_updates = step + 1, progress.skipped_updates + int(metrics["skipped"] > 0)
        if distributed.is_main():
            run.folder.append_metrics({"step": progress.step, **metrics})
            bar.set_postfix(loss=f"{metrics[f'loss/{term}']:.3f}", refresh=False)
        skipped_in_a_row = skipped_in_a_row + 1 if metrics["skipped"] else 0
        gave_up, stopping = skipped_in_a_row >= config.actor.max_skipped, points.after_step()
        if progress.step % config.checkpoint.every == 0 or progress.step == config.sft.steps or stopping or gave_up:
            points.enter("checkpoint")
            with run.checkpoints.tolerated():
                distributed.together(run.folder.finish_lines, OSError)
                run.checkpoints.save(parts, progress)
            points.limit.checkpoint_s = run.checkpoints.seconds
        if stopping or gave_up:
            break
    with run.checkpoints.tolerated():
        run.checkpoints.wait()
    if gave_up:
        log.error("%d updates in a row had a non-finite loss; stopped with a checkpoint", skipped_in_a_row)
        raise Ended(stage.supervisor.failed(progress.step))
    if stopping:
        raise Ended(stage.supervisor.stopped(progress.step))
    stage.stop.undefer()
    points.enter("evaluation")
    export(actor, exported(config, run.folder))
    return progress.seconds


# --- stage 0: raw text ---------------------------------------------------------------------------------------------


def read_text(config: RunConfig, asked: Format) -> tuple[TextBlocks, TextBlocks]:
    """(blocks to learn from, every twentieth, which is held out). Raises ValueError where there are too few."""
    check_context(config, text=True)
    blocks = text_blocks(config.data, asked, config.cache_dir)
    check_vocabulary("student.path", config.student.path, asked, (), blocks)
    every = np.arange(1, len(blocks) + 1) % HELD_OUT_EVERY == 0
    text, held = blocks.picked(~every), blocks.picked(every)
    least = f"gives {len(blocks)} blocks; {HELD_OUT_EVERY} are needed at least"
    require(len(held) > 0, "data.text", config.data.text, least)
    require(config.sft.batch <= len(text), "sft.batch", config.sft.batch, f"is more than {len(text)} blocks of text")
    return text, held


def learn_text(stage: Stage, inputs: tuple[TextBlocks, TextBlocks]) -> str:
    """L_PT alone; bits a byte of the held-out blocks are measured before and after. Collective."""
    (text, held), actor = inputs, stage.new_actor()

    def measured() -> Result:
        return Result(
            measure="bits_per_byte",
            model=stage.config.student.path,
            data={"path": stage.config.data.text, "rows": len(held)},
            settings={"text_block_tokens": stage.config.data.text_block_tokens},
            versions=versions("torch", "transformers"),
            values={"bits_per_byte": Value(bits_per_byte(actor, held))},
        )

    before = evaluation_once(stage.run.folder, "before", measured).get("bits_per_byte", math.nan)
    seconds = train(stage, actor, text, lambda mine: UpdateInput(None, flat(mine), [], LossWeights(pt=1.0)), "pt")
    after = bits_per_byte(actor, held)
    stage.finish(
        {
            "seconds": seconds,
            "bits_per_byte_before": before,
            "bits_per_byte_after": after,
            "held_out_blocks": len(held),
            "data": stage.config.data.text,
        },
        "continued pre-training on raw text",
        {"before": {"bits_per_byte": before}, "after": {"bits_per_byte": after}},
        stage.config.data.text,
    )
    return f"held-out bits a byte {before:.4f} before, {after:.4f} after"


def bits_per_byte(actor: Actor, blocks: TextBlocks) -> float:
    """Bits that the student needs for a byte of the blocks' text behind each one's first token; the end symbols cost
    bits and are no bytes. Collective."""
    mine = flat(share_of_rank(blocks, distributed.rank(), distributed.world_size()))
    nats = -float(each_token(actor.engine.passes, mine, lambda row: actor.policy(row).logprobs_S).double().sum())
    size = bytes_of([b.responses[0] for b in mine], actor.tokenizer)
    total = distributed.sum_metrics({"nats": nats, "bytes": float(size)})
    return total["nats"] / math.log(2) / max(total["bytes"], 1.0)


def bytes_of(responses: Sequence[Sequence[int]], tokenizer: Any) -> int:
    """Bytes of text in these stretches of a stream of tokens, which may begin and end inside a character."""
    try:
        return sum(map(TokenBytes(tokenizer, "student.path").size, responses))
    except ValueError:  # no pieces of bytes: none is a part of a character
        texts = tokenizer.batch_decode([list(tokens) for tokens in responses], skip_special_tokens=True)
        return sum(len(text.encode()) for text in texts)


# --- stage 1: answers ----------------------------------------------------------------------------------------------


def read_questions(config: RunConfig, asked: Format) -> tuple[list[Prompt], list[Prompt]]:
    """(questions to learn the answers of, held-out ones). Raises ValueError where a batch cannot be had."""
    room, data, own = room_for_prompt(config), config.data, config.sft.answers == "data"
    key = "data.warmup" if own else "data.prompts"
    prompts = load_prompts(key, data, asked, room=room, need_answers=own)
    heldout = load_prompts("data.heldout", data, asked, room=room, need_answers=True)
    if data.open is not None:
        heldout += load_prompts("data.open", data, asked, room=room, need_answers=False)
    require(config.sft.batch <= len(prompts), "sft.batch", config.sft.batch, f"is more than {len(prompts)} examples")
    check_vocabulary("student.path", config.student.path, asked, [prompt.tokens for prompt in (*prompts, *heldout)])
    if launcher.environment_rank() == 0:
        for line in data_warnings(config, heldout, stage=1):
            log.warning("%s", line)
    return prompts, heldout


def learn_answers(stage: Stage, inputs: tuple[Sequence[Prompt], Sequence[Prompt]]) -> str:
    """L_BC alone, on the data's answers or the teacher's; greedy answers to the held-out questions are scored.
    Collective."""
    (prompts, heldout), config, asked = inputs, stage.config, stage.asked
    every = [*prompts, *heldout]
    facts = teacher_facts(config, config.teacher) if config.sft.answers == "teacher" else None
    if facts is not None:
        check_tokenizers(config, "teacher.path", facts)
        check_room(f"teacher.path = {str(facts.path)!r}", facts.teacher, context_length(facts.path), config, every)
        asks = (facts.teacher.prompt(prompt.asked) for prompt in every)
        check_vocabulary("teacher.path", facts.path, facts.teacher, asks)
    with ExitStack() as stack:
        actor = None if facts is None else stage.new_actor(facts)  # before much is asked: it may be refused
        link = None if actor is None or facts is None else ask_teacher(stage, facts, stack, every, actor.teacher_head)
        if link is None:
            answers_N = [[(prompt.answers[0], True)] for prompt in prompts]
        else:
            answers_N = teacher_answers(config, link, prompts)
        examples = cloned(prompts, answers_N, asked, None if link is None else config.sampling.max_new_tokens)
        if link is None:
            check_context(config, text=False, examples=examples)
        answers = [response for one in examples for response in one.responses]
        check_vocabulary("student.path", config.student.path, asked, answers)
        actor = actor or stage.new_actor()
        seconds = train(stage, actor, examples, lambda mine: UpdateInput(None, [], mine, SUPERVISED), "bc")
        after = evaluate(actor, link, heldout, config, str(stage.run.folder.export))
    if distributed.is_main():
        after.write(stage.run.folder.evaluation("after"))
    whose = "the data's answers" if link is None else "the teacher's answers"
    learnt = config.data.warmup if link is None else config.data.prompts
    scores = {"student after": after.numbers}
    stage.finish({"seconds": seconds, "eval_after": after.numbers}, f"supervised learning from {whose}", scores, learnt)
    found = after.numbers
    open_ones = f", right open answers {found['open_right']:.1f} %" if "open_right" in found else ""
    return f"held-out F1 {found['f1']:.1f}, exact match {found['exact_match']:.1f}{open_ones}"


def cloned(
    prompts: Sequence[Prompt], answers_N: Sequence[Sequence[tuple[str, bool]]], asked: Format, longest: int | None
) -> list[Group]:
    """Each prompt with each of its answers (text, whether it has ended) that is not empty, cut behind `longest` tokens:
    in the student's tokens an answer of the teacher may be longer than in its own."""
    examples: list[Group] = []
    cut = 0
    for prompt, answers in zip(prompts, answers_N, strict=True):
        for text, ended in answers:
            example = answer_group(prompt, text, asked, ended=ended)
            (tokens,) = example.responses
            cut += not ended or len(tokens[:longest]) < len(tokens)
            examples += [replace(example, responses=(tokens[:longest],))] if text else []
    if cut and distributed.is_main():
        log.warning("%d of %d answers of the teacher are cut at sampling.max_new_tokens; no end is learnt from them",
                    cut, sum(map(len, answers_N)))  # fmt: skip
    return examples


def ask_teacher(
    stage: Stage, facts: TeacherFacts, stack: ExitStack, prompts: Sequence[Prompt], head: Head | None
) -> TeacherLink:
    """This rank's session with the running server, or with one that starts here and ends with `stack`. Collective."""
    teacher = stage.config.teacher
    link = connect(teacher, find_teacher(teacher, stage.run.folder.path / "teacher", stack), facts, stack, head)
    check_served_model("teacher", teacher, link)
    check_served_room("teacher.path", link, stage.config, prompts)
    return link


def teacher_answers(config: RunConfig, link: TeacherLink, prompts: Sequence[Prompt]) -> list[list[tuple[str, bool]]]:
    """The teacher's answers to each prompt, and whether each has ended; asked once and kept in the cache folder.
    Collective."""
    found = distributed.by_main(lambda: _asked(config, link, prompts)) or []
    return [json.loads(one) for one in distributed.gather_strings(list(map(json.dumps, found)))]


def _asked(config: RunConfig, link: TeacherLink, prompts: Sequence[Prompt]) -> list[list[tuple[str, bool]]]:
    teacher, folder, samples = Path(config.teacher.path), Path(config.cache_dir), config.sft.samples
    asked, temperature = format_of("teacher", config.teacher, config.data), config.distill.answer_temperature
    who = [fingerprint(teacher, whole=False), config.teacher.url, config.teacher.served_name]
    how = [config.sampling.max_new_tokens, asked.rendered("?"), asked.end, temperature, samples, config.seed]
    key = hashlib.sha256(json.dumps([*who, *how]).encode()).hexdigest()[:16]
    path = folder / f"teacher-answers-{key}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):  # runs that start together ask once
        known: dict[str, list[tuple[str, bool]]] = read_json(path) if path.is_file() else {}
        missing = [p for p in prompts if p.text not in known]
        kept = time.monotonic()
        bar = tqdm(range(0, len(missing), config.eval.batch), "the teacher's answers", disable=not missing)
        try:
            for start in bar:
                batch = missing[start : start + config.eval.batch]
                repeated = [prompt for prompt in batch for _ in range(samples)]
                seed = config.seed * len(missing) + start
                answers = link.answer(repeated, config.sampling.max_new_tokens, temperature=temperature, seed=seed)
                known |= {p.text: answers[i * samples : (i + 1) * samples] for i, p in enumerate(batch)}
                if time.monotonic() - kept > KEEP_S:
                    _keep(path, known)
                    kept = time.monotonic()
        finally:  # a start that is stopped here asks for the rest next time
            if missing:
                _keep(path, known)
    return [known[p.text] for p in prompts]


def _keep(path: Path, known: Mapping[str, Any]) -> None:
    """A disk that is full ends no stage: its next start asks again."""
    try:
        write_atomically(path, json.dumps(known, ensure_ascii=False, indent=0))
    except OSError as error:
        log.warning("%s: %s; the teacher's answers are not kept", path, error.strerror)
