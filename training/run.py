"""A run of stage 2 from a checked configuration to its summary: set up, evaluate, train, evaluate, report."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from configs.schema import RunConfig, TeacherConfig, as_dict
from inference.client import TeacherClient, TeacherLost
from inference.fingerprint import tokenizer_fingerprint
from inference.launch import start_local_teacher
from training import distributed
from training.actor import Actor
from training.bilingual import Bilingual, Translator
from training.checkpoints import Checkpoints, NoWholeCheckpoint, open_run, step_numbers
from training.cli import ROOT, fail
from training.collect import Models
from training.composite import single_step_coef
from training.critic import Critic
from training.deepspeed_engine import start_distributed
from training.demo import resolve_demo
from training.evaluation import Evaluation, evaluate_student, evaluate_teacher
from training.loop import save_checkpoint, saved_parts, train
from training.memory import lowered
from training.mixing import check_mixing
from training.overlap import data_warnings
from training.preflight import Inputs, check_files, check_world, load_inputs, with_model_directories
from training.recipes import RECIPES, check_recipe
from training.reference import FrozenCopy, Reference, make_reference
from training.run_folder import Progress, RunFolder, comparison_table
from training.sampling_check import check_sampling
from training.starts import Starts
from training.stopping import StopRequest, watch_launcher
from training.supervisor import Supervisor
from training.teacher_check import teacher_check, warning
from training.teaching import TeacherFacts, TeacherLink, check_tokenizers, teacher_facts
from training.validation import due
from training.validation import summary as validation_summary

log = logging.getLogger(__name__)
FREE_KEYS = ("steps", "sft.steps", "sft.output", "actor.zero_stage", "critic.zero_stage", "threads",
             "runs_dir", "cache_dir", "name", "checkpoint.", "teacher.address", "teacher.interface",
             "teacher.port", "teacher.threads", "teacher.timeout_s", "time_limit_s", "stuck_timeout_s",
             "actor.micro_batch_tokens")  # fmt: skip
"""Settings that may differ when a run is resumed; those of `teacher` are free in `teachers` too."""
_PLACE = re.compile(r"^teachers\[\d+\]")


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
    watch_launcher()
    quiet_logging()
    try:
        config, facts, inputs = prepare(config)
        folder = RunFolder(Path(config.runs_dir) / config.run_name)
        check_same_run(folder, config)
        config = lowered(config, folder.path)
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))
    if inputs.skipped.count and distributed.environment_rank() == 0:
        log.warning(
            "%d prompts are too long and are skipped (the longest has %d tokens)",
            inputs.skipped.count, inputs.skipped.longest,
        )  # fmt: skip
    if distributed.environment_rank() == 0:
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
    config = with_model_directories(config)
    check_files(config)
    check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
    set_threads(config)
    config = resolve_demo(config, stage=2)
    facts = teacher_facts(Path(config.teacher.path), config.student.path)
    single_step_coef(config, facts.same_tokenizer)
    check_recipe(config, facts.same_tokenizer)
    check_mixing(config, facts.same_tokenizer)
    check_tokenizers(config, "teacher.path", facts)
    for place, extra in enumerate(config.teachers):
        check_tokenizers(config, f"teachers[{place}].path", teacher_facts(Path(extra.path), config.student.path))
    tokenizer = AutoTokenizer.from_pretrained(config.student.path)
    return config, facts, load_inputs(config, tokenizer, tokenizer.eos_token_id)


def _run(setup: Setup, supervisor: Supervisor, stack: ExitStack) -> int:
    """Start everything, run the loop, evaluate, write the summary."""
    config, folder = setup.config, setup.folder
    start_distributed()
    try:
        opened = open_run(folder, config, {"student": config.actor.zero_stage, "critic": config.critic.zero_stage})
    except ValueError as error:
        fail(str(error))
    checkpoints = opened.checkpoints
    link, models = start_models(setup, stack)
    progress = opened.load(saved_parts(models), Progress(kl_coef=config.ppo.kl_penalty))
    points = supervisor.watch(progress.step)
    points.enter("evaluation")
    before = _evaluation_once(
        setup, "before", lambda: evaluate_student(models.actor, link, setup.inputs.heldout, config)
    )
    _check_teacher(setup, models)
    setup.stop.defer()
    try:
        status = train(config, models, setup.inputs.corpus, folder, checkpoints, progress, points)
    except TeacherLost:
        if not due(config, progress):  # lost in a validation: the step is done again from the last checkpoint
            save_checkpoint(models, folder, checkpoints, progress, config, points)
        with checkpoints.tolerated():
            checkpoints.wait()
        raise
    setup.stop.undefer()
    if status != "finished":
        code = supervisor.stopped(progress.step) if status == "stopped" else supervisor.failed(progress.step)
        _write_summary(setup, progress, status, {"eval_before": before}, supervisor.starts)
        return code
    points.enter("evaluation")
    exported = _restore_best(config, checkpoints, models, progress)
    if RECIPES[config.recipe].interpolate:
        models.actor.interpolate(config.student.path, config.distill.warp_rate)
    models.actor.export(folder.export)
    after = evaluate_student(models.actor, link, setup.inputs.heldout, config)
    _save_evaluation(setup, "after", after)
    # One rank asks the teacher for answers; the others wait at the next collective.
    teacher = _evaluation_once(
        setup,
        "teacher",
        lambda: evaluate_teacher(link, setup.inputs.heldout, config) if distributed.is_main() else None,
    )
    distributed.barrier()
    evaluations = {"eval_before": before, "eval_after": after.scores(), "teacher_eval": teacher}
    supervisor.starts.end(status, 0, progress.step)
    judged = validation_summary(config, progress, exported)
    _write_summary(setup, progress, status, evaluations | judged, supervisor.starts)
    if distributed.is_main():
        folder.close()
        _report(folder)
        _print_table(folder, evaluations)
    return 0


def _restore_best(config: RunConfig, checkpoints: Checkpoints, models: Models, progress: Progress) -> int:
    """The best student in place of the last one, where eval.export asks for it; the step of the one that stays."""
    if config.eval.export == "last" or progress.best_step == 0:
        return progress.step
    try:
        return checkpoints.load_best({"student": saved_parts(models)["student"]})
    except NoWholeCheckpoint as error:  # damaged, or there was no room for it
        log.warning("%s; the last student is exported", error)
        return progress.step


def start_models(setup: Setup, stack: ExitStack) -> tuple[TeacherLink, Models]:
    """The teacher first (it starts beside us), then the student and who else takes part."""
    config = setup.config
    address, secret = find_teacher(config.teacher, setup.folder.path / "teacher", stack)
    beside = [find_teacher(t, setup.folder.path / f"teacher-{t.name}", stack) for t in config.teachers]
    output_VD = None
    if setup.facts.same_tokenizer:
        output_VD = setup.facts.output_layer(torch.float32)
    torch.manual_seed(config.seed)
    actor = Actor(
        config, config.student.path, total_steps=config.steps * config.actor.updates_per_rollout,
        learning_rate=config.actor.learning_rate, teacher_output_VD=output_VD,
        divergence=RECIPES[config.recipe].divergence,
    )  # fmt: skip
    if config.actor.check_sampling:
        check_sampling(actor, setup.inputs.corpus.prompts[:4], config)
    reference, start = _references(config, actor)
    total = config.steps * config.actor.updates_per_rollout
    critical = config.algo == "ppo" and RECIPES[config.recipe].policy_gradient
    critic = Critic(config, Path(config.student.path), total_steps=total) if critical else None
    link = _connect(config.teacher, (address, secret), setup.facts, actor.teacher_output_VD, stack)
    others = [
        _connect(extra, where, teacher_facts(Path(extra.path), config.student.path), None, stack)
        for extra, where in zip(config.teachers, beside, strict=True)
    ]
    bilingual = None
    if (weight := config.rewards.bilingual_weight) != 0:
        translate = Translator(config.rewards.bilingual, actor.engine.device)
        bilingual = Bilingual(config.rewards.bilingual, weight, translate, link)
    return link, Models(actor, reference, critic, link, start, others, bilingual)


def _connect(
    teacher: TeacherConfig, where: tuple[str, str], facts: TeacherFacts, output_VD: torch.Tensor | None,
    stack: ExitStack,
) -> TeacherLink:  # fmt: skip
    """This rank's session with the server at `where` (address, secret)."""
    fingerprint = tokenizer_fingerprint(facts.student) if facts.same_tokenizer else None
    client = TeacherClient(
        where[0], secret=where[1], tokenizer_fingerprint=fingerprint, timeout_s=teacher.timeout_s,
        prefer=distributed.rank(),
    )  # fmt: skip
    link = TeacherLink(client, facts, output_VD)
    stack.callback(link.close)
    return link


def _references(config: RunConfig, actor: Actor) -> tuple[Reference | None, Reference | None]:
    """What the KL term is measured against, and what the limit is; one and the same where it stays the start."""
    limited = config.reference.kl_limit is not None
    penalised = config.algo == "ppo" and config.ppo.kl_penalty > 0
    wanted = RECIPES[config.recipe].policy_gradient and (penalised or config.loss.kl_coef > 0)
    fixed = config.reference.update == "fixed"
    reference = make_reference(config, actor) if wanted or (limited and fixed) else None
    if not limited:
        return reference, None
    if fixed:
        return reference, reference
    return reference, FrozenCopy(config, config.student.path, actor.engine.device, update="fixed")


def find_teacher(teacher: TeacherConfig, work_dir: Path, stack: ExitStack) -> tuple[str, str]:
    """Address and secret: a running server's, or those of one that rank 0 starts and takes down with itself. Its log
    is in `work_dir`. Collective."""
    if teacher.address is not None:
        return teacher.address, os.environ.get("GRPO_KD_TEACHER_SECRET", "")
    parts = ["", ""]
    if distributed.is_main():
        local = start_local_teacher(teacher, Path(teacher.path), work_dir)
        stack.callback(local.stop)
        parts = [local.address, local.secret]
    gathered = distributed.gather_strings(parts)
    return gathered[0], gathered[1]


def _evaluation_once(setup: Setup, name: str, evaluate: Any) -> dict[str, float]:
    """Evaluate, or read what an earlier start of this run wrote. Collective; scores count on rank 0."""
    saved = setup.folder.read_json(f"eval/{name}.json")
    distributed.barrier()
    if saved is not None:
        return {k: float(saved[k]) for k in ("f1", "exact_match", "reverse_kl")}
    evaluation = evaluate()
    if evaluation is None:
        return {}
    _save_evaluation(setup, name, evaluation)
    return evaluation.scores()


def _check_teacher(setup: Setup, models: Models) -> None:
    """Minimal pairs, once a run, where the configuration asks for them. Collective."""
    name = "eval/minimal_pairs.json"
    saved = setup.folder.read_json(name)
    distributed.barrier()
    if setup.config.eval.minimal_pairs == 0 or saved is not None:
        return
    found = teacher_check(models.actor, models.teacher, setup.config, setup.inputs.heldout)
    if distributed.is_main():
        setup.folder.write_json(name, found)
        if (line := warning(found)) is not None:
            log.warning("%s", line)


def _save_evaluation(setup: Setup, name: str, evaluation: Evaluation) -> None:
    if distributed.is_main():
        setup.folder.write_json(f"eval/{name}.json", evaluation.as_json(setup.config.data.heldout))


def _write_summary(
    setup: Setup, progress: Progress, status: str, evaluations: Mapping[str, Any], starts: Starts
) -> None:
    if not distributed.is_main():
        return
    setup.folder.write_json(
        "summary.json",
        {
            "status": status,
            "algo": setup.config.algo,
            "reward": setup.config.reward,
            "steps": progress.step,
            "seconds": {k: round(v, 3) for k, v in progress.seconds.items()},
            "tokens": progress.tokens,
            "skipped_updates": progress.skipped_updates,
            "kl_limit_reached": progress.kl_limit_reached,
            "starts": starts.listed(),
            **evaluations,
        },
    )


def already_finished(folder: RunFolder, config: RunConfig) -> bool:
    """Show the table of a run that has nothing left to do."""
    summary = folder.read_json("summary.json")
    if summary is None or summary["status"] != "finished":
        return False
    over = summary.get("kl_limit_reached") or (summary.get("validation") or {}).get("stopped_early")
    if summary["steps"] < config.steps and not over:
        return False
    if distributed.environment_rank() == 0:
        _print_table(folder, summary)
        print("The run was finished already; choose another --name to run it anew.", flush=True)
    return True


def _print_table(folder: RunFolder, evaluations: Mapping[str, Any]) -> None:
    """Student before, student after, teacher."""
    keys = {"student before": "eval_before", "student after": "eval_after", "teacher": "teacher_eval"}
    print(f"\n{folder.path.name}: held-out questions; F1 and exact match in percent, reverse KL in nats a token\n")
    print(comparison_table([(name, evaluations[key]) for name, key in keys.items()]))
    print(f"\n{folder.path}/report.html", flush=True)


def _report(folder: RunFolder) -> None:
    """The page is made from the run folder alone, by a process of its own; a broken page does not fail the run."""
    command = [sys.executable, str(ROOT / "eval" / "report.py"), "--run", str(folder.path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        log.warning("report.html was not made: %s", done.stderr.strip().splitlines()[-1:])


def check_same_run(folder: RunFolder, config: RunConfig) -> None:
    """A run goes on only with the settings that it was started with. Raises ValueError naming what differs.

    A setting that is younger than the run had its default then.
    """
    path = folder.path / "config.yaml"
    if not path.is_file() or not step_numbers(folder.checkpoints):
        return
    default, new = (_flat(json.loads(json.dumps(as_dict(c)))) for c in (RunConfig(), config))
    old = default | _flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    keys = sorted(old.keys() | new.keys())
    changed = [k for k in keys if old.get(k) != new.get(k) and not _PLACE.sub("teacher", k).startswith(FREE_KEYS)]
    if changed:
        differences = ", ".join(f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in changed[:5])
        raise ValueError(
            f"name = {folder.path.name!r}: {folder.path} was started with other settings ({differences}); "
            "choose another --name, or delete that folder"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key == "teachers":
            for place, teacher in enumerate(value):
                flat |= _flat(teacher, f"{key}[{place}].")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def set_threads(config: RunConfig) -> None:
    """Share the cores among this machine's trainer ranks."""
    local = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")) or 1)
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // max(local, 1)))


def quiet_logging() -> None:
    """Our own messages in one line each; libraries only when something is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", force=True)
    logging.getLogger("training").setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
