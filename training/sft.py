"""Stage 1: supervised warm-up of the student on answers from the data or from the teacher.

    bash slurm/run_stage1_sft.sh
    deepspeed training/sft.py --config configs/demo/sft.yaml --sft.answers teacher

The trained model goes to --sft.output (default runs/NAME/export). Teacher answers are asked through its server and
kept in the cache folder, so that no question is asked twice. The same command again goes on where the run stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.files import write_atomically
from configs.schema import RunConfig, require, validate
from training.cli import DEMO_CONFIGS, fail, parse

if TYPE_CHECKING:
    from inference.packing import Group
    from training.actor import Actor
    from training.checkpoints import OpenRun
    from training.composite import UpdateInput
    from training.experience import Prompt
    from training.stopping import StopRequest

Item = TypeVar("Item")
log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Parse, check, train."""
    config = parse(argv, "Stage 1: supervised warm-up.", lambda _: DEMO_CONFIGS / "sft.yaml")
    try:
        validate(config)
    except ValueError as error:
        fail(str(error))
    return run_stage(run, config)


def run_stage(run: Callable[[RunConfig, StopRequest], int], config: RunConfig) -> int:
    """Run stage 0 or 1 under the launcher's and the scheduler's signals; returns the exit code."""
    from training.checkpoints import CheckpointFailed
    from training.stopping import StopRequest, watch_launcher

    stop = StopRequest()
    watch_launcher()
    try:
        return run(config, stop)
    except CheckpointFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def run(config: RunConfig, stop: StopRequest) -> int:
    """Run stage 1; returns the exit code."""
    from transformers import AutoTokenizer

    from training import distributed
    from training.data import answer_group, load_prompts
    from training.deepspeed_engine import start_distributed
    from training.demo import resolve_demo
    from training.overlap import data_warnings
    from training.preflight import check_files, room_for_prompt, with_model_directories
    from training.run import quiet_logging, set_threads

    quiet_logging()
    try:
        config = with_model_directories(config)
        check_files(config)
        set_threads(config)
        config = resolve_demo(config, stage=1)
        tokenizer = AutoTokenizer.from_pretrained(config.student.path)
        room, data = room_for_prompt(config), config.data
        own_answers = config.sft.answers == "data"
        prompts, _ = load_prompts(data.warmup, data, tokenizer, key="data.warmup", room=room, need_answers=own_answers)
        heldout, _ = load_prompts(data.heldout, data, tokenizer, key="data.heldout", room=room, need_answers=True)
        require(
            config.sft.batch <= len(prompts), "sft.batch", config.sft.batch, f"is more than {len(prompts)} examples"
        )
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))
    if distributed.environment_rank() == 0:
        for line in data_warnings(config, heldout, stage=1):
            log.warning("%s", line)
    start_distributed()
    answers = [p.answers[0] for p in prompts] if own_answers else teacher_answers(config, prompts)
    end_token = int(tokenizer.eos_token_id)
    examples = [
        answer_group(p, answer, tokenizer, end_token) for p, answer in zip(prompts, answers, strict=True) if answer
    ]
    scores = fit(config, examples, heldout, stop)
    if scores is None:
        return stop.exit_code
    if distributed.is_main():
        print(f"stage 1: held-out F1 {scores['f1']:.1f}, exact match {scores['exact_match']:.1f}", flush=True)
    return 0


def fit(
    config: RunConfig, examples: Sequence[Group], heldout: Sequence[Prompt], stop: StopRequest
) -> dict[str, float] | None:
    """Train on (prompt, answer) groups, export, and score greedy answers on the held-out questions; None where it was
    stopped. Collective."""
    import torch

    from training import distributed
    from training.actor import Actor
    from training.composite import SUPERVISED, UpdateInput
    from training.evaluation import greedy_answers, score_answers

    run = open_run(config, "sft")
    torch.manual_seed(config.seed)
    actor = Actor(config, config.student.path, total_steps=config.sft.steps, learning_rate=config.sft.learning_rate)
    if not train_supervised(
        actor, config, run, examples, lambda mine: UpdateInput(None, [], mine, SUPERVISED), stop, stage=1, term="bc"
    ):
        return None
    evaluation = score_answers(heldout, greedy_answers(actor, heldout, config), float("nan"))
    scores = {"f1": evaluation.f1, "exact_match": evaluation.exact_match}
    if distributed.is_main():
        run.folder.write_json("summary.json", {"status": "finished", "steps": config.sft.steps, "eval_after": scores})
        run.folder.close()
    return scores


def open_run(config: RunConfig, name: str) -> OpenRun:
    """The folder runs/NAME of a supervised stage, made ready to begin or to go on. Ends the program where it belongs to
    other settings or none of its checkpoints can be gone on from. Collective."""
    from training.checkpoints import open_run
    from training.run import check_same_run
    from training.run_folder import RunFolder

    folder = RunFolder(Path(config.runs_dir) / (config.name or name))
    try:
        check_same_run(folder, config)
        return open_run(folder, config, {"student": config.actor.zero_stage})
    except ValueError as error:
        fail(str(error))


def train_supervised(
    actor: Actor, config: RunConfig, run: OpenRun, groups: Sequence[Item],
    learnt: Callable[[list[Item]], UpdateInput], stop: StopRequest, *, stage: int, term: str,
) -> bool:  # fmt: skip
    """config.sft.steps optimizer steps on this rank's share of `groups`, from the newest checkpoint on, logged by step,
    and the export. Returns whether it came to the end; a stop request ends it with a checkpoint. Collective.

    `learnt` makes the update of a step's groups; `term` is the loss that the bar shows.
    """
    from tqdm import tqdm

    from training import distributed
    from training.data import positions_of_step, share_of_rank

    parts = {"student": actor.engine}
    progress = run.load(parts)
    bar = tqdm(
        range(progress.step, config.sft.steps), total=config.sft.steps, initial=progress.step, desc=f"stage {stage}",
        unit="step", disable=not distributed.is_main(),
    )  # fmt: skip
    stop.defer()
    stopping = False
    for step in bar:
        chosen = positions_of_step(step, config.sft.batch, len(groups), config.seed)
        mine = [groups[i] for i in share_of_rank(chosen, distributed.rank(), distributed.world_size())]
        metrics = actor.update([learnt(mine)], step)
        progress.step, progress.skipped_updates = step + 1, progress.skipped_updates + int(metrics["skipped"] > 0)
        if distributed.is_main():
            run.folder.append_metrics({"step": progress.step, **metrics})
            bar.set_postfix(loss=f"{metrics[f'loss/{term}']:.3f}", refresh=False)
        ended, stopping = progress.step == config.sft.steps, distributed.any_rank(stop.requested)
        if progress.step % config.checkpoint.every == 0 or ended or stopping:
            with run.checkpoints.tolerated():
                distributed.together(run.folder.finish_lines, OSError)
                run.checkpoints.save(parts, progress)
        if stopping:
            break
    with run.checkpoints.tolerated():
        run.checkpoints.wait()
    stop.undefer()
    if progress.step < config.sft.steps:
        return False
    actor.export(Path(config.sft.output) if config.sft.output else run.folder.export)
    return True


def teacher_answers(config: RunConfig, prompts: Sequence[Prompt]) -> list[str]:
    """The teacher's greedy answer to each prompt, asked once and kept in the cache folder. Collective."""
    from training import distributed

    if not distributed.is_main():
        return distributed.gather_strings([])
    from inference.client import TeacherClient
    from inference.fingerprint import tokenizer_fingerprint
    from inference.launch import start_local_teacher
    from training.teaching import TeacherLink, teacher_facts

    teacher = Path(config.teacher.path)
    chat = " chat" if config.data.use_chat_template else ""
    key = hashlib.sha256(f"{tokenizer_fingerprint(teacher)} {teacher.resolve()}{chat}".encode()).hexdigest()[:16]
    path = Path(config.cache_dir) / f"teacher-answers-{key}.json"
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    missing = [p for p in prompts if p.text not in known]
    if missing:
        with ExitStack() as stack:
            address, secret = config.teacher.address, os.environ.get("GRPO_KD_TEACHER_SECRET", "")
            if address is None:
                local = start_local_teacher(config.teacher, teacher, Path(config.cache_dir) / "teacher")
                stack.callback(local.stop)
                address, secret = local.address, local.secret
            facts = teacher_facts(teacher, config.student.path)
            fingerprint = tokenizer_fingerprint(config.student.path) if facts.same_tokenizer else None
            client = TeacherClient(
                address, secret=secret, tokenizer_fingerprint=fingerprint, timeout_s=config.teacher.timeout_s
            )
            link = TeacherLink(client, facts, None)
            stack.callback(link.close)
            for start in range(0, len(missing), config.eval.batch):
                batch = missing[start : start + config.eval.batch]
                texts = link.answer(batch, config.sampling.max_new_tokens).result()
                known |= {p.text: text for p, text in zip(batch, texts, strict=True)}
                write_atomically(path, json.dumps(known, ensure_ascii=False, indent=0))
    answers = [known[p.text] for p in prompts]
    return distributed.gather_strings(answers)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
