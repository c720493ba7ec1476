"""Checks that the values of a configuration alone decide. A check never changes a value."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.learning import ApiConfig
    from configs.schema import RunConfig


def require(condition: bool, key: str, value: object, mend: str) -> None:
    """Raise a ValueError that names the key, the value and the mend unless `condition` holds."""
    if not condition:
        raise ValueError(f"{key} = {value!r}: {mend}")


def _at_least(config: object, prefix: str, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= least, f"{prefix}{name}", value, f"must be at least {least:g}")


def _above_zero(config: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{prefix}{name}", value, "must be above 0")


def validate(config: RunConfig) -> None:
    """Check everything that the values alone decide. Raises ValueError naming key, value and mend."""
    _at_least(config, "", 1, "steps", "prompts_per_step")
    require(
        config.name is None or ("/" not in config.name and config.name not in ("", ".", "..")),
        "name",
        config.name,
        "must be a plain folder name; choose the parent with runs_dir",
    )
    require(
        config.prompts_per_step % config.actor.updates_per_rollout == 0,
        "prompts_per_step",
        config.prompts_per_step,
        f"must be a multiple of actor.updates_per_rollout ({config.actor.updates_per_rollout})",
    )
    _validate_sampling(config)
    _validate_mixing(config)
    _validate_loss(config)
    _validate_around(config)
    _validate_rewards(config)
    require(
        config.time_limit_s is None or config.time_limit_s > 0, "time_limit_s", config.time_limit_s, "must be above 0"
    )
    require(
        config.stuck_timeout_s > config.teacher.timeout_s, "stuck_timeout_s", config.stuck_timeout_s,
        f"must be above teacher.timeout_s ({config.teacher.timeout_s:g}), which a rank may wait for",
    )  # fmt: skip
    _validate_teachers(config)
    _above_zero(config.actor, "actor.", "learning_rate", "max_grad_norm")
    _above_zero(config.critic, "critic.", "learning_rate")
    _at_least(config.actor, "actor.", 1, "micro_batch_tokens", "updates_per_rollout")
    _at_least(config.data, "data.", 2, "max_prompt_tokens", "text_block_tokens")
    for key in ("template", "context_template"):
        value = getattr(config.data, key)
        require("{question}" in value, f"data.{key}", value, "must contain {question}")
    context = config.data.context_template
    require("{context}" in context, "data.context_template", context, "must contain {context}")
    _at_least(config.sft, "sft.", 1, "steps", "batch")
    _above_zero(config.sft, "sft.", "learning_rate")
    _at_least(config.eval, "eval.", 1, "batch", "kl_samples")
    _at_least(config.eval, "eval.", 0, "minimal_pairs", "every", "patience")
    _at_least(config.eval, "eval.", 1, "validation_questions")
    for key, value in (
        ("eval.patience", config.eval.patience),
        ("eval.export", config.eval.export),
        ("data.validation", config.data.validation),
    ):
        unused = value in (0, "last", None)
        require(unused or config.eval.every > 0, key, value, "needs validations in the loop: set eval.every")
    _at_least(config.checkpoint, "checkpoint.", 1, "every", "keep", "samples_every")


def _validate_sampling(config: RunConfig) -> None:
    """How many responses, from which part of the distribution."""
    sampling = config.sampling
    _at_least(sampling, "sampling.", 1, "group_size", "max_new_tokens")
    _at_least(sampling, "sampling.", 0, "top_k")
    _above_zero(sampling, "sampling.", "temperature", "top_p")
    require(sampling.top_p <= 1, "sampling.top_p", sampling.top_p, "is a share of the probability mass: at most 1")
    require(
        config.algo != "grpo" or sampling.group_size >= 2,
        "sampling.group_size",
        sampling.group_size,
        "GRPO compares the responses of a group, so it needs at least 2 (4 to 16 are usual), or use --algo ppo",
    )


def _validate_loss(config: RunConfig) -> None:
    """Clipping, weights and their courses."""
    loss = config.loss
    require(0 < loss.clip_low < 1, "loss.clip_low", loss.clip_low, "must lie between 0 and 1")
    _above_zero(loss, "loss.", "clip_high")
    _at_least(loss, "loss.", 0, "policy_coef", "kl_coef", "bc_coef", "gradient_shares_every", "single_step_entries")
    _at_least(loss, "loss.", 1, "pt_batch", "bc_batch")
    for key in ("pt_coef", "single_step_coef"):
        value = getattr(loss, key)
        require(value is None or value >= 0, f"loss.{key}", value, "must be at least 0")
    cap = loss.importance_cap
    require(
        cap is None or cap >= 1,
        "loss.importance_cap",
        cap,
        "cuts weights whose mean is 1, so it must be at least 1 (2 is usual)",
    )
    for key in ("policy", "kl", "pt", "bc", "single_step"):
        schedule = getattr(loss, f"{key}_schedule")
        _at_least(schedule, f"loss.{key}_schedule.", 0, "final")
        steps = schedule.steps
        require(steps is None or steps >= 1, f"loss.{key}_schedule.steps", steps, "must be at least 1")
    require(
        loss.gradient_shares_every == 0 or config.actor.zero_stage < 3,
        "loss.gradient_shares_every",
        loss.gradient_shares_every,
        "measures gradients outside DeepSpeed's own pass, which ZeRO 3 does not allow: set it to 0, or "
        "actor.zero_stage to 2",
    )
    require(
        loss.single_step_entries == 0 or config.recipe not in ("gkd", "sampled_ce"),
        "loss.single_step_entries",
        loss.single_step_entries,
        f"recipe {config.recipe} needs the whole distribution: set it to 0",
    )
    require(
        not loss.pt_coef or config.data.text is not None,
        "loss.pt_coef",
        loss.pt_coef,
        "needs raw text: set data.text to a JSONL file with a `text` in each row",
    )


def _validate_mixing(config: RunConfig) -> None:
    """Truncation and the teacher's share in sampling."""
    sampling = config.sampling
    for key in ("min_p", "teacher_mix"):
        value = getattr(sampling, key)
        require(0 <= value < 1, f"sampling.{key}", value, "must be at least 0 and below 1")
    require(
        sampling.teacher_mix == 0 or (sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0),
        "sampling.teacher_mix",
        sampling.teacher_mix,
        "a mixture is sampled from whole: leave sampling.top_k, top_p and min_p out",
    )
    require(
        config.actor.rollout == "grouped" or (sampling.teacher_mix == 0 and sampling.min_p == 0),
        "actor.rollout",
        config.actor.rollout,
        "DeepSpeed's interface knows neither sampling.teacher_mix nor sampling.min_p: set both to 0, or use grouped",
    )
    require(
        sampling.teacher_mix == 0 or sampling.temperature == 1,
        "sampling.temperature",
        sampling.temperature,
        "sampling.teacher_mix mixes the two models' distributions at temperature 1",
    )


def _validate_rewards(config: RunConfig) -> None:
    """The extra parts of the reward."""
    rewards = config.rewards
    require(math.isfinite(rewards.teacher_weight), "rewards.teacher_weight", rewards.teacher_weight, "must be finite")
    for name in ("exact_match", "similarity", "language", "format", "length", "judge", "bilingual"):
        weight = getattr(rewards, f"{name}_weight")
        require(math.isfinite(weight), f"rewards.{name}_weight", weight, "must be a finite number (0: off)")
    _at_least(rewards, "rewards.", 1, "length_min_words")
    require(
        rewards.length_max_words >= rewards.length_min_words,
        "rewards.length_max_words",
        rewards.length_max_words,
        f"must be at least rewards.length_min_words ({rewards.length_min_words})",
    )
    try:
        re.compile(rewards.format_pattern)
    except re.error as error:
        require(False, "rewards.format_pattern", rewards.format_pattern, f"is no regular expression: {error}")
    bilingual = rewards.bilingual
    _at_least(bilingual, "rewards.bilingual.", 1, "max_new_tokens", "batch")
    for key, needed in (("instruction", "{text}"), ("template", "{question}"), ("context_template", "{question}")):
        value = getattr(bilingual, key)
        require(needed in value, f"rewards.bilingual.{key}", value, f"must contain {needed}")
    require(
        rewards.bilingual_weight == 0 or bilingual.path is not None,
        "rewards.bilingual.path",
        bilingual.path,
        "name the model that translates, or set rewards.bilingual_weight to 0",
    )
    judge = rewards.judge
    require(
        rewards.judge_weight == 0 or judge.model is not None,
        "rewards.judge.model",
        judge.model,
        "name the model that judges, or set rewards.judge_weight to 0",
    )
    validate_api(judge, "rewards.judge.")


def _validate_teachers(config: RunConfig) -> None:
    """`teacher`, and the ones beside it."""
    keys = {"teacher.": config.teacher} | {f"teachers[{i}].": teacher for i, teacher in enumerate(config.teachers)}
    for prefix, teacher in keys.items():
        _at_least(teacher, prefix, 1, "tensor_parallel", "threads", "max_batch_tokens", "logit_chunk")
        _above_zero(teacher, prefix, "timeout_s")
    names = [teacher.name for teacher in config.teachers]
    for i, teacher in enumerate(config.teachers):
        require(
            bool(re.fullmatch(r"[\w.-]+", teacher.name)) and teacher.name not in names[:i],
            f"teachers[{i}].name",
            teacher.name,
            "give each its own name of letters, digits, `.`, `_` and `-`",
        )
        require(math.isfinite(teacher.weight), f"teachers[{i}].weight", teacher.weight, "must be a finite number")
    require(
        not config.teachers or config.recipe in ("rl", "bond", "warp"),
        "teachers",
        names,
        f"recipe {config.recipe} has no reward to which other teachers could add: leave them out, or use --recipe rl",
    )


def validate_api(api: ApiConfig, prefix: str) -> None:
    """An endpoint's settings. Raises ValueError."""
    _at_least(api, prefix, 1, "attempts", "parallel", "max_tokens")
    _at_least(
        api, prefix, 0, "temperature", "backoff_s", "requests_per_minute", "dollars_per_million_in",
        "dollars_per_million_out",
    )  # fmt: skip
    _above_zero(api, prefix, "timeout_s")


def _validate_around(config: RunConfig) -> None:
    """Reference, phases, recipes."""
    reference, distill = config.reference, config.distill
    _at_least(reference, "reference.", 1, "every")
    require(0 <= reference.decay < 1, "reference.decay", reference.decay, "must be at least 0 and below 1")
    require(
        reference.kl_limit is None or reference.kl_limit > 0,
        "reference.kl_limit",
        reference.kl_limit,
        "must be above 0",
    )
    _at_least(config.student.adapter, "student.adapter.", 0, "rank")
    _above_zero(config.student.adapter, "student.adapter.", "alpha")
    require(
        not config.student.adapter.four_bit or config.student.adapter.rank > 0,
        "student.adapter.four_bit",
        config.student.adapter.four_bit,
        "4-bit weights are frozen: set student.adapter.rank (16 is usual), which is what is trained then",
    )
    _at_least(config.phases, "phases.", 0, "every")
    _at_least(config.phases, "phases.", 1, "steps")
    _at_least(config.grpo, "grpo.", 1, "resample_rounds")
    _at_least(distill, "distill.", 1, "sampled_tokens")
    _at_least(distill, "distill.", 0, "answer_temperature")
    for key in ("jsd_beta", "bond_forward", "warp_rate"):
        value = getattr(distill, key)
        require(0 <= value <= 1, f"distill.{key}", value, "must lie between 0 and 1")
    require(
        config.recipe != "bond" or config.algo == "grpo",
        "algo",
        config.algo,
        "recipe bond ranks the responses of a group: use --algo grpo",
    )
    require(
        config.recipe != "bond" or config.sampling.teacher_mix == 0,
        "sampling.teacher_mix",
        config.sampling.teacher_mix,
        "recipe bond ranks the student's own responses: set it to 0",
    )
