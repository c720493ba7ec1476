"""A run of stage 2 from a checked configuration to its summary: set up, evaluate, train, evaluate, report."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.checks import validate
from configs.io.results import HELDOUT, Result, find_result
from configs.schema import RunConfig
from inference.client import TeacherLost
from training import distributed
from training.algorithms import has_critic, has_reference
from training.collect import Models, Run
from training.data.demo.resolve import resolve_demo
from training.data.overlap import data_warnings
from training.data.preflight import (
    Inputs,
    check_files,
    check_interfaces,
    check_room,
    check_served_room,
    check_vocabulary,
    check_world,
    context_length,
    load_inputs,
    with_model_directories,
)
from training.evaluation import evaluate, evaluate_teacher, validation_summary
from training.experience import Prompt
from training.loop import save_checkpoint, saved_parts, train
from training.recipes import RECIPES
from training.run import launcher
from training.run.boards import board_names
from training.run.card import publish
from training.run.checkpoints import Checkpoints
from training.run.choices import check_choices, check_vocabularies, without_effect
from training.run.cli import ROOT, fail
from training.run.console import quiet_logging
from training.run.resuming import NoWholeCheckpoint, check_settings, load_best, open_run
from training.run.run_folder import Progress, RunFolder
from training.run.safe_points import SafePoints, TimeLimit
from training.run.stopping import StopRequest
from training.run.supervisor import Supervisor, lowered
from training.student.actor import Actor
from training.student.critic import Critic
from training.student.deepspeed_engine import start_distributed
from training.student.export import export, interpolate
from training.student.reference import FrozenCopy, Reference, make_reference
from training.student.sampling_check import check_sampling
from training.teacher.bilingual import Bilingual, Translator
from training.teacher.check import teacher_check, warning
from training.teacher.connect import check_served_model, connect, find_teacher
from training.teacher.facts import TeacherFacts, check_tokenizers, teacher_facts
from training.teacher.link import TeacherLink
from training.teacher.mixing import check_cache
from training.teacher.reward_parts import check_extra_rewards

log = logging.getLogger(__name__)
ROWS = {"student before": "eval_before", "student after": "eval_after", "teacher": "teacher_eval"}
"""Rows of the table that a run ends with, and where summary.json has them."""


@dataclass(frozen=True)
class Setup:
    """What a run needs besides its models."""

    config: RunConfig
    inputs: Inputs
    facts: TeacherFacts
    folder: RunFolder
    stop: StopRequest


def run(config: RunConfig) -> int:
    """Run stage 2; returns the exit code."""
    stop = StopRequest()
    launcher.watch_launcher()
    quiet_logging()
    try:
        boards = board_names(config.report_to)
        config, facts, inputs = prepare(config)
        folder = RunFolder(Path(config.runs_dir) / config.run_name, boards)
        check_settings(folder, config)
        config = lowered(config, folder.path)
    except (ValueError, OSError) as error:
        fail(str(error))
    if launcher.environment_rank() == 0:
        if unread := without_effect(config, facts.same_tokenizer):
            chosen = f"algo {config.algo}, reward {config.reward}, recipe {config.recipe}"
            log.warning("without effect on the student with %s and its weights: %s", chosen, ", ".join(unread))
        for line in data_warnings(config, inputs.heldout):
            log.warning("%s", line)
    if already_finished(folder, config):
        return 0
    supervisor = Supervisor(config, folder.path, stop)
    setup = Setup(config, inputs, facts, folder, stop)
    with ExitStack() as stack:
        return supervisor.run(lambda: _run(setup, supervisor, stack))


def prepare(config: RunConfig) -> tuple[RunConfig, TeacherFacts, Inputs]:
    """Everything up to the first model: the demo built, all paths resolved, files checked and read.

    Raises ValueError for a mistake in the input.
    """
    launcher.check_launcher()
    check_choices(config)
    config = with_model_directories(config)
    check_extra_rewards(config)
    check_files(config)
    check_world(config, launcher.environment_world_size())
    check_interfaces(config, several_machines=launcher.several_machines())
    launcher.set_threads(config.threads)
    config = resolve_demo(config, stage=2)
    facts = teacher_facts(config, config.teacher)
    check_vocabularies(config, facts.same_tokenizer, facts.columns)
    every = {f"{key}.path": teacher_facts(config, one, key) for key, one in config.every_teacher.items()}
    for key, one in every.items():
        check_tokenizers(config, key, one)
    inputs = load_inputs(config, facts.student)
    for key, one in every.items():
        check_room(f"{key} = {str(one.path)!r}", one.teacher, context_length(one.path), config, inputs.prompts)
        asks = (one.teacher.prompt(prompt.asked) for prompt in inputs.prompts)
        check_vocabulary(key, one.path, one.teacher, asks)
    check_cache(config, facts.teacher, inputs.corpus.prompts)
    return config, facts, inputs


@contextmanager
def opened(config: RunConfig) -> Iterator[Run]:
    """A run's teacher, models and data without its loop, for a notebook (docs/python.md).

    The teacher's server ends with the block, and nothing else is left. Raises ValueError for a mistake in the input.
    """
    validate(config)
    config, facts, inputs = prepare(config)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stop = StopRequest(listen=False)
        yield without_loop(Setup(config, inputs, facts, RunFolder(Path(folder)), stop), stack)


def without_loop(setup: Setup, stack: ExitStack) -> Run:
    """The run, whose steps somebody else takes: nobody watches how far it is. Collective."""
    start_distributed()
    return Run(
        config=setup.config,
        models=start_models(setup, stack),
        corpus=setup.inputs.corpus,
        folder=setup.folder,
        checkpoints=Checkpoints(setup.folder.checkpoints, setup.config.checkpoint),
        points=SafePoints(setup.stop, TimeLimit(None)),
    )


def _run(setup: Setup, supervisor: Supervisor, stack: ExitStack) -> int:
    """Start everything, run the loop, evaluate, write the summary."""
    config, folder = setup.config, setup.folder
    start_distributed(config.stuck_timeout_s)
    try:
        opened = open_run(folder, config, {"student": config.actor.zero_stage, "critic": config.critic.zero_stage})
    except ValueError as error:
        fail(str(error))
    models = start_models(setup, stack)
    progress = opened.load(saved_parts(models), Progress(kl_coef=config.ppo.kl_penalty))
    run = Run(config, models, setup.inputs.corpus, folder, opened.checkpoints, supervisor.watch(progress.step))
    run.points.enter("evaluation")
    heldout = setup.inputs.heldout

    def evaluated(model: str) -> Result:
        return evaluate(models.actor, models.teacher, heldout, config, model)

    before = evaluation_once(folder, "before", lambda: evaluated(config.student.path))
    _check_teacher(run, heldout)
    setup.stop.defer()
    try:
        status = train(run, progress)
    except TeacherLost:
        # Lost in a validation: the step is done again from its checkpoint.
        if not progress.validation_due(config.eval.every):
            save_checkpoint(run, progress)
        with run.checkpoints.tolerated():
            run.checkpoints.wait()
        raise
    if status != "finished":
        code = supervisor.stopped(progress.step) if status == "stopped" else supervisor.failed(progress.step)
        _write_summary(run, progress, {"status": status, "starts": supervisor.starts.listed(), "eval_before": before})
        return code
    setup.stop.undefer()
    run.points.enter("evaluation")
    exported = _restore_best(run, progress)
    if RECIPES[config.recipe].interpolate:
        interpolate(models.actor, config.student.path, config.distill.warp_rate)
    export(models.actor, folder.export)
    after = evaluated(str(folder.export))
    if distributed.is_main():
        after.write(folder.evaluation("after"))
    teacher = evaluation_once(
        folder, "teacher", lambda: distributed.by_main(lambda: evaluate_teacher(models.teacher, heldout, config))
    )
    evaluations = {"eval_before": before, "eval_after": after.numbers, "teacher_eval": teacher}
    if (other := config.eval.baseline) is not None:
        interpolate(models.actor, other, 0.0)
        evaluations["eval_baseline"] = evaluation_once(folder, "baseline", lambda: evaluated(other))
    supervisor.finished(progress.step)
    if distributed.is_main():  # before summary.json: a start that finds it has nothing left to do
        how = RECIPES[config.recipe].title.format(algo=config.algo, reward=config.reward)
        scores = {name: evaluations[key] for name, key in ROWS.items()}
        data = [config.data.prompts, config.data.text]
        publish(folder.export, config, f"{how} from a teacher, {progress.step} steps", scores, data)
    outcome = {"status": status, "starts": supervisor.starts.listed(), **evaluations}
    _write_summary(run, progress, outcome | validation_summary(config, progress, exported))
    if distributed.is_main():
        folder.boards.log({f"eval/{name}": value for name, value in after.numbers.items()}, progress.step)
        folder.boards.close()
        _report(folder)
        _print_table(folder, evaluations)
    return 0


def _restore_best(run: Run, progress: Progress) -> int:
    """The best student in place of the last one, where eval.export asks for it; the step of the one that stays."""
    if run.config.eval.export == "last" or progress.best_step == 0:
        return progress.step
    try:
        return load_best(run.checkpoints, {"student": saved_parts(run.models)["student"]})
    except NoWholeCheckpoint as error:  # damaged, or there was no room for it
        log.warning("%s; the last student is exported", error)
        return progress.step


def start_models(setup: Setup, stack: ExitStack) -> Models:
    """The teacher first (it starts beside us), then the student and who else takes part."""
    config, facts = setup.config, setup.facts
    place = find_teacher(config.teacher, setup.folder.path / "teacher", stack)
    beside = [find_teacher(t, setup.folder.path / f"teacher-{t.name}", stack) for t in config.teachers]
    torch.manual_seed(config.seed)
    total = config.steps * config.actor.updates_per_rollout
    actor = Actor(config, total_steps=total, learning_rate=config.actor.learning_rate, teacher_head=facts.head())
    actor.end_tokens = tuple(sorted({*actor.end_tokens, *facts.exchanged}))
    if facts.same_tokenizer:
        actor.policy.limit(facts.columns)
    if distributed.is_main():
        for line in facts.described(setup.inputs.corpus.prompts[0].asked, actor.policy.columns):
            log.info("%s", line)
    check_sampling(actor, setup.inputs.corpus.prompts[:4], config)
    reference, start = _references(config, actor)
    critic = None
    if has_critic(config):
        critic = Critic(config, total_steps=total, grouped=actor.policy.grouped)
    link = connect(config.teacher, place, facts, stack, actor.teacher_head)
    if facts.same_tokenizer:
        _check_answers(config, link)
    pairs = zip(config.teachers, beside, strict=True)
    others = [connect(extra, where, teacher_facts(config, extra), stack) for extra, where in pairs]
    for (key, teacher), one in zip(config.every_teacher.items(), (link, *others), strict=True):
        check_served_model(key, teacher, one)
        check_served_room(f"{key}.path", one, config, setup.inputs.prompts)
    bilingual = None
    if config.rewards.bilingual_weight != 0:
        translate = Translator(config.rewards.bilingual, actor.engine.device)
        bilingual = Bilingual(config.rewards.bilingual, translate, link)
    return Models(actor, reference, critic, link, start, others, bilingual)


def _check_answers(config: RunConfig, link: TeacherLink) -> None:
    """A teacher whose backend does not give what this run asks of it is a mistake in the input."""
    compares = RECIPES[config.recipe].weights(config, 0, True).single_step > 0
    if link.head is None and compares and config.loss.single_step_entries == 0:
        fail(
            f"teacher.path = {config.teacher.path!r}: its backend has no hidden states that give its logits, so its "
            "whole distribution cannot be had; set loss.single_step_entries to 16 (recipe rl), or "
            "loss.single_step_coef to 0"
        )
    kinds = link.client.info().kinds
    if config.sampling.teacher_mix > 0 and config.sampling.mix_by == "token" and "open" not in kinds:
        fail(
            f"sampling.mix_by = {config.sampling.mix_by!r}: the teacher's backend cannot answer token by token; use "
            "response, or teacher.backend megatron"
        )


def _references(config: RunConfig, actor: Actor) -> tuple[Reference | None, Reference | None]:
    """What the KL term is measured against, and what the limit is; one and the same where it stays the start."""
    limited = config.reference.kl_limit is not None
    fixed = config.reference.update == "fixed"
    reference = make_reference(config, actor) if has_reference(config) or (limited and fixed) else None
    if not limited:
        return reference, None
    if fixed:
        return reference, reference
    return reference, FrozenCopy(config, actor.engine.device, update="fixed", way=actor.policy.way)


def evaluation_once(folder: RunFolder, name: str, evaluate: Callable[[], Result | None]) -> dict[str, float]:
    """Evaluate, or read what an earlier start of this run wrote. Collective; scores count on rank 0."""
    file = folder.evaluation(name)
    saved = find_result(file)
    missing = distributed.any_rank(distributed.is_main() and saved is None)  # others may not see it yet, over NFS
    found = evaluate() if missing else saved
    if found is None:
        return {}
    if missing and distributed.is_main():
        found.write(file)
    return found.numbers


def _check_teacher(run: Run, heldout: Sequence[Prompt]) -> None:
    """Minimal pairs, once a run, where the configuration asks for them. Collective."""
    file = run.folder.evaluation("minimal_pairs")
    if run.config.eval.minimal_pairs == 0 or not distributed.any_rank(distributed.is_main() and not file.is_file()):
        return
    found = teacher_check(run.models.actor, run.models.teacher, run.config, heldout)
    if distributed.is_main():
        found.write(file)
        if (line := warning(found)) is not None:
            log.warning("%s", line)


def _write_summary(run: Run, progress: Progress, outcome: Mapping[str, Any]) -> None:
    """summary.json: how far the run came, and its `outcome`. Rank 0 writes. Where its checkpoint has taken the last of
    the room, a run that has stopped goes without: its exit code says to start it again."""
    if not distributed.is_main():
        return
    summary = {
        "algo": run.config.algo,
        "reward": run.config.reward,
        "steps": progress.step,
        "seconds": {k: round(v, 3) for k, v in progress.seconds.items()},
        "tokens": progress.tokens,
        "skipped_updates": progress.skipped_updates,
        "kl_limit_reached": progress.kl_limit_reached,
        **outcome,
    }
    try:
        run.folder.write_json("summary.json", summary)
    except OSError as error:
        if outcome["status"] == "finished":
            raise
        log.warning("summary.json cannot be written (%s)", error.strerror)


def already_finished(folder: RunFolder, config: RunConfig) -> bool:
    """Show the table of a run that has nothing left to do."""
    summary = folder.read_json("summary.json")
    if summary is None or summary["status"] != "finished":
        return False
    over = summary.get("kl_limit_reached") or (summary.get("validation") or {}).get("stopped_early")
    if summary["steps"] < config.steps and not over:
        return False
    if launcher.environment_rank() == 0:
        if not (folder.path / "report.html").is_file():  # killed before it was made
            _report(folder)
        _print_table(folder, summary)
        print("The run was finished already; choose another --name for a new run.", flush=True)
    return True


def _print_table(folder: RunFolder, evaluations: Mapping[str, Any]) -> None:
    """Student before, student after, teacher, by what was measured: open questions are not asked in every run."""
    asked = "; open: questions with many right answers" if "open_right" in evaluations["eval_before"] else ""
    units = f"F1, exact match and right answers in percent, KL in nats a token{asked}"
    print(f"\n{folder.path.name}: held-out questions; {units}\n")
    rows = ROWS | ({"baseline": "eval_baseline"} if "eval_baseline" in evaluations else {})
    found = {name: evaluations[key] for name, key in rows.items()}
    columns = {key: one for key, one in HELDOUT.items() if any(key in scores for scores in found.values())}
    print(head := f"{'':24}" + "".join(f"{heading:>12}" for _, heading, _ in columns.values()))
    print("-" * len(head))
    for name, scores in found.items():
        cells = [f"{scores[key]:12.{n}f}" if key in scores else f"{'':12}" for key, (_, _, n) in columns.items()]
        print(f"{name:24}{''.join(cells)}")
    print(f"\n{folder.path}/report.html", flush=True)


def _report(folder: RunFolder) -> None:
    """The page is made from the run folder alone, by a process of its own; a broken page does not fail the run."""
    command = [sys.executable, str(ROOT / "eval" / "report.py"), "--run", str(folder.path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        log.warning("report.html was not made: %s", done.stderr.strip().splitlines()[-1:])
