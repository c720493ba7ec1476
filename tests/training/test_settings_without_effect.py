"""A setting that nothing of the chosen algorithm, reward and recipe reads is named, and only such a one."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import yaml

from configs.schema import RunConfig, as_dict, flat
from training.run.choices import _readers, check_choices, without_effect


def configured(options: str) -> RunConfig:
    """A run with `--KEY VALUE ...`, as the command line has them, but without its parser (a second each)."""
    words = options.split()
    config = RunConfig()
    for key, value in zip(words[::2], words[1::2], strict=True):
        *sections, name = key.removeprefix("--").split(".")
        inner = [reduce(getattr, sections[:i], config) for i in range(len(sections) + 1)]
        changed: Any = yaml.safe_load(value)
        for one, field in zip(reversed(inner), reversed([*sections, name]), strict=True):
            changed = replace(one, **{field: changed})
        config = changed
    return config


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ("", ""),
        ("--recipe seqkd --loss.single_step_coef 0.5", "loss.single_step_coef"),
        ("--recipe seqkd --loss.single_step_coef 0 --loss.kl_coef 0", ""),
        ("--recipe seqkd --loss.bc_coef 2 --loss.bc_schedule.kind linear --distill.answer_temperature 1", ""),
        ("--recipe bond --loss.single_step_coef 0.5 --loss.bc_coef 0.1", "loss.bc_coef loss.single_step_coef"),
        ("--recipe bond --grpo.scale none --grpo.baseline leave_one_out --distill.bond_forward 0.1", "grpo.scale"),
        ("--recipe gkd --loss.single_step_coef 0.5 --distill.jsd_beta 0.1 --loss.clip_low 0.1", "loss.clip_low"),
        ("--recipe gkd --loss.kl_coef 0.1 --reference.update ema --rewards.format_weight 0.2",
         "loss.kl_coef reference.update rewards.format_weight"),
        ("--recipe gkd --algo ppo --ppo.gamma 0.9 --critic.learning_rate 1e-4", "critic.learning_rate ppo.gamma"),
        ("--recipe sampled_ce --sampling.group_size 4 --distill.warp_rate 0.1",
         "distill.warp_rate sampling.group_size"),
        ("--recipe warp --distill.warp_rate 0.1 --loss.kl_coef 0.1 --reference.update ema", ""),
        ("--ppo.kl_penalty 0.1 --grpo.resample_rounds 3", "grpo.resample_rounds ppo.kl_penalty"),
        ("--algo ppo --ppo.kl_penalty 0.1 --grpo.scale none", "grpo.scale"),
        ("--reward teacher_logprob --rewards.gamma 0.9 --rewards.length_alpha 0", "rewards.gamma"),
        ("--reward teacher_logprob --loss.single_step_entries 16 --loss.pt_batch 4",
         "loss.pt_batch loss.single_step_entries"),
        ("--rewards.length_alpha 0 --rewards.length_max_words 9 --rewards.judge.model m",
         "rewards.judge.model rewards.length_alpha rewards.length_max_words"),
        ("--rewards.length_weight 1 --rewards.length_max_words 9", ""),
        ("--sampling.mix_weight sequence", "sampling.mix_weight"),
        ("--sampling.teacher_mix 0.1 --sampling.mix_weight sequence", ""),
        ("--loss.pt_schedule.final 0.5 --loss.kl_schedule.kind linear",
         "loss.kl_schedule.kind loss.pt_schedule.final"),
        # MiniLLM's normalised returns are GRPO's; a sum of rewards has its discount where it begins behind the token
        ("--rewards.gamma 0.9 --rewards.length_normalize false", ""),
        ("--algo ppo --rewards.gamma 0.9 --rewards.length_normalize false", "rewards.length_normalize"),
        ("--recipe bond --rewards.gamma 0.9 --rewards.length_normalize false",
         "rewards.gamma rewards.length_normalize"),
        ("--algo ppo --loss.single_step_coef 0 --rewards.gamma 0.9", "rewards.gamma"),
        ("--algo ppo --ppo.kl_penalty 0 --ppo.kl_target 0.1", "ppo.kl_target"),
        ("--recipe seqkd --loss.importance_cap 2 --sampling.temperature 0.7 --loss.pt_coef 0 --loss.pt_batch 4",
         "loss.importance_cap loss.pt_batch sampling.temperature"),
        ("--loss.policy_coef 0 --rewards.format_weight 1 --grpo.scale none", "grpo.scale rewards.format_weight"),
        ("--loss.policy_coef 0 --rewards.format_weight 1 --grpo.no_signal skip", ""),
        ("--reward teacher_logprob --data.text mine.jsonl --data.deduplicate true", "data.deduplicate data.text"),
        ("--reward teacher_logprob --data.text mine.jsonl --loss.pt_coef 0", ""),
        ("--reward teacher_logprob --data.text null", ""),
        ("--reward teacher_logprob --data.text mine.jsonl --eval.minimal_pairs 50 --data.text_packing documents",
         "data.text_packing"),
        ("--eval.metric reverse_kl --eval.validation_questions 9", "eval.metric eval.validation_questions"),
        ("--actor.offload true --actor.zero_stage 0", "actor.offload"),
        ("--algo ppo --actor.offload true --actor.zero_stage 0 --critic.zero_stage 2", ""),
    ],
)  # fmt: skip
def test_what_is_asked_for_and_not_read(options: str, unread: str) -> None:
    assert without_effect(configured(options), True) == unread.split()


def test_the_table_names_settings_that_there_are() -> None:
    keys = flat(as_dict(RunConfig()))
    unknown = [start for start in _readers(RunConfig(), True) if not any(key.startswith(start) for key in keys)]
    assert not unknown


@pytest.mark.parametrize("recipe", ["gkd", "seqkd", "sampled_ce"])
def test_one_response_is_a_group_where_none_are_compared(recipe: str) -> None:
    check_choices(configured(f"--recipe {recipe} --sampling.group_size 1"))
    with pytest.raises(ValueError, match=r"sampling.group_size = 1: --algo grpo compares"):
        check_choices(configured("--sampling.group_size 1"))


def test_a_teacher_that_writes_every_answer_is_not_mixed_in() -> None:
    """Its answers would be learnt from with the weights of samples from a mixture."""
    with pytest.raises(ValueError, match=r"sampling.teacher_mix = 0.2: with recipe sampled_ce the teacher writes"):
        check_choices(configured("--recipe sampled_ce --sampling.teacher_mix 0.2"))
