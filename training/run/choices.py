"""What was chosen: do algorithm, reward, recipe and teacher go together, and which settings are then read?"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from configs.checks import check_rules, require
from configs.schema import RunConfig, as_dict, flat
from rewards import REWARDS
from training.algorithms import ALGORITHMS, has_critic, has_reference, learns_from_groups
from training.objective import TERMS
from training.recipes import RECIPES


def check_choices(config: RunConfig) -> None:
    """Algorithm, reward and recipe are rows of their tables, and go together. Raises ValueError with the mend."""
    tables: dict[str, Collection[str]] = {"algo": ALGORITHMS, "reward": REWARDS, "recipe": RECIPES}
    for key, table in tables.items():
        name = getattr(config, key)
        require(name in table, key, name, f"is unknown; use one of {', '.join(table)}")
    check_rules(config, _rules(config))
    names, mend = [teacher.name for teacher in config.teachers], "leave them out, or use --recipe rl"
    mend = f"recipe {config.recipe} has no reward to which other teachers could add: {mend}"
    require(not names or RECIPES[config.recipe].policy_gradient, "teachers", names, mend)


def _rules(config: RunConfig) -> Iterator[tuple[str, bool, str]]:
    """What goes together (configs/checks.py)."""
    algorithm, recipe, named = ALGORITHMS[config.algo], RECIPES[config.recipe], f"recipe {config.recipe}"
    mend = f"--algo {config.algo} compares responses to the same prompt; use at least 2"
    yield "sampling.group_size", not learns_from_groups(config) or config.sampling.group_size >= 2, mend
    mend = f"{named} ranks the responses of a group: use --algo grpo"
    yield "algo", not recipe.ranks_groups or algorithm.compares_groups, mend
    mend = f"{named} ranks the student's own responses: set it to 0"
    yield "sampling.teacher_mix", not recipe.ranks_groups or config.sampling.teacher_mix == 0, mend
    mend = f"with {named} the teacher writes every answer: set it to 0"
    yield "sampling.teacher_mix", not recipe.teacher_answers or config.sampling.teacher_mix == 0, mend
    mend = f"{named} needs the whole distribution: set it to 0"
    yield "loss.single_step_entries", not recipe.always_divergence or config.loss.single_step_entries == 0, mend


def check_vocabularies(config: RunConfig, same_tokenizer: bool, columns: int) -> None:
    """What compares or mixes distributions can have the teacher's, whose vocabulary has `columns`. Raises ValueError
    with the mend."""
    loss, sampling = config.loss, config.sampling
    different = "student and teacher have different tokenizers"
    mend = f"the exact single-step KL compares whole vocabularies, and {different}; set it to 0 or leave it out"
    require(same_tokenizer or not loss.single_step_coef, "loss.single_step_coef", loss.single_step_coef, mend)
    mend = f"the teacher's vocabulary has {columns}: set fewer, or 0 for the whole distribution"
    require(loss.single_step_entries <= columns, "loss.single_step_entries", loss.single_step_entries, mend)
    mend = f"it compares whole vocabularies, and {different}; use seqkd, bond, warp or rl"
    require(same_tokenizer or not RECIPES[config.recipe].always_divergence, "recipe", config.recipe, mend)
    mend = f"token by token it needs one tokenizer, and {different}; set sampling.mix_by to response"
    whole = sampling.teacher_mix == 0 or sampling.mix_by == "response"
    require(same_tokenizer or whole, "sampling.teacher_mix", sampling.teacher_mix, mend)


def without_effect(config: RunConfig, same_tokenizer: bool) -> list[str]:
    """Keys of the settings that are not at their defaults and that the student of this run does not depend on: those
    of another algorithm, reward or recipe, and those of a term or a part that has no weight."""
    known = flat(as_dict(RunConfig()))
    asked = {key for key, value in flat(as_dict(config)).items() if value != known.get(key, value)}
    asked -= {f"loss.{term}_coef" for term in TERMS if not getattr(config.loss, f"{term}_coef")}  # off, as it is
    asked -= {"data.text"} if config.data.text is None else set()
    unread = [prefix for prefix, read in _readers(config, same_tokenizer).items() if not read]
    return sorted(key for key in asked if key.startswith(tuple(unread)))


def _readers(config: RunConfig, same_tokenizer: bool) -> dict[str, bool]:
    """How keys begin, and whether what they set is read in this run."""
    algorithm, recipe, rewards = ALGORITHMS[config.algo], RECIPES[config.recipe], config.rewards
    weights = recipe.weights(config, 0, same_tokenizer)
    critic, penalised = has_critic(config), has_reference(config)
    chosen = learns_from_groups(config) and config.grpo.no_signal != "keep"
    learnt = recipe.policy_gradient and (weights.policy > 0 or recipe.ranks_groups or chosen)
    returns = learnt and algorithm.compares_groups and not recipe.ranks_groups
    read = {
        "actor.offload": config.actor.zero_stage > 0 or (critic and config.critic.zero_stage > 0),
        "data.text": weights.pt > 0 or config.loss.pt_coef is not None or config.eval.minimal_pairs > 0,
        "data.text_": weights.pt > 0,
        "data.deduplicate": weights.pt > 0,
        "eval.metric": config.eval.every > 0,
        "eval.validation_questions": config.eval.every > 0,
        "grpo.": learnt and algorithm.compares_groups,
        "grpo.scale": not recipe.ranks_groups,
        "grpo.epsilon": not recipe.ranks_groups,
        "grpo.resample_rounds": config.grpo.no_signal == "resample",
        "ppo.": critic and learnt,
        "ppo.kl_target": config.ppo.kl_penalty > 0,
        "critic.learning_rate": critic,
        "reference.update": penalised,
        "reference.every": penalised and config.reference.update == "every",
        "loss.clip_": weights.policy > 0,
        "loss.ratio": weights.policy > 0,
        "loss.aggregation": weights.policy > 0 or weights.kl > 0,
        "loss.kl_estimator": weights.kl > 0,
        "loss.importance_cap": not recipe.teacher_answers,
        "loss.pt_batch": weights.pt > 0 or (weights.bc > 0 and recipe.imitated is None),
        "loss.bc_": recipe.imitated is None or recipe.teacher_answers,
        "loss.single_step_entries": weights.single_step > 0,
        "sampling.group_size": not recipe.teacher_answers,
        "sampling.temperature": not recipe.teacher_answers,
        "sampling.mix_by": config.sampling.teacher_mix > 0,
        "sampling.mix_weight": config.sampling.teacher_mix > 0 and config.sampling.mix_by == "token",
        "phases.steps": config.phases.every > 0,
        "student.adapter.": config.student.adapter.rank > 0,
        "distill.answer_temperature": recipe.teacher_answers or config.sft.answers == "teacher",
        "rewards.": learnt,
        "rewards.similarity_metric": rewards.similarity_weight != 0,
        "rewards.language_dictionary": rewards.language_weight != 0,
        "rewards.format_pattern": rewards.format_weight != 0,
        "rewards.length_min_words": rewards.length_weight != 0,
        "rewards.length_max_words": rewards.length_weight != 0,
        "rewards.judge.": rewards.judge_weight != 0,
        "rewards.bilingual.": rewards.bilingual_weight != 0,
        "rewards.custom_weight": rewards.custom is not None,
    }
    for term in TERMS:
        weighed = getattr(weights, term) > 0
        read[f"loss.{term}_coef"] = weighed
        read[f"loss.{term}_schedule."] = weighed and getattr(config.loss, f"{term}_schedule").kind != "constant"
    for key in (name for row in RECIPES.values() for name in row.settings):
        read[f"distill.{key}"] = key in recipe.settings
    for key in (name for kind in REWARDS.values() for name in kind.settings):
        read[f"rewards.{key}"] = key in REWARDS[config.reward].settings
    read["rewards.length_normalize"] &= returns  # of the sums of rewards, in place of MiniLLM's returns, it is no part
    read["rewards.gamma"] &= returns or weights.single_step > 0
    return read
