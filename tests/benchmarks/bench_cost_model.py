"""Seconds of a step's parts over several shapes beside what training/cost_model.py predicts, on this machine's CPU.

    python tests/benchmarks/bench_cost_model.py

A random Llama of 7 million parameters under the real actor and reference, one thread. Two rates (large products, and
the skinny ones of decoding) are taken from the first shape; all else is predicted. Predicted / measured is printed, in
seconds of this process, so that others on the machine disturb little.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)

import torch
import transformers

from configs.schema import ActorConfig, LossConfig, RunConfig, SamplingConfig, StudentConfig
from inference.families import Architecture, parse_architecture
from tests.student_models import VOCAB
from tests.teacher_models import save_tokenizer
from training import cost_model
from training.actor import Actor
from training.composite import LossWeights, UpdateInput
from training.cost_model import Work
from training.deepspeed_engine import start_distributed
from training.experience import Experience, Prompt
from training.reference import FrozenCopy

SHAPES = [
    Work(prompts=2, group=8, prompt=400, response=32),
    Work(prompts=4, group=8, prompt=400, response=32),
    Work(prompts=2, group=8, prompt=64, response=128),
    Work(prompts=2, group=4, prompt=800, response=16),
    Work(prompts=2, group=16, prompt=200, response=64),
]
ROUNDS = 3
PARTS = ("prefill", "decode", "reference", "update")


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(folder: Path, work: Work) -> dict[str, float]:
    """Median seconds of each part."""
    config = RunConfig(
        student=StudentConfig(path=str(folder)),
        sampling=SamplingConfig(group_size=work.group, max_new_tokens=work.response),
        actor=ActorConfig(zero_stage=0),
        loss=LossConfig(kl_coef=0.1),
    )
    actor = Actor(config, folder, total_steps=100, learning_rate=1e-6)
    actor.end_tokens = ()  # every response goes on to its last token
    reference = FrozenCopy(config, folder, actor.engine.device)
    random = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(n, "", tuple(torch.randint(3, VOCAB, (work.prompt,), generator=random).tolist()), (), "")
        for n in range(work.prompts)
    ]
    rounds: list[dict[str, float]] = []
    for step in range(ROUNDS + 1):
        marks: list[float] = []
        start = time.process_time()
        rollout = actor.sample(prompts, step=step, on_step=lambda _, marks=marks: marks.append(time.process_time()))
        found = {"prefill": marks[0] - start, "decode": marks[-1] - marks[0]}
        found["reference"] = seconds(lambda rollout=rollout: reference.logprobs(rollout))
        advantages_BR = torch.randn(rollout.behavior_logprobs_BR.shape, generator=random)
        experience = Experience(rollout, advantages_BR, rollout.behavior_logprobs_BR, None)
        batch = UpdateInput(experience, (), (), LossWeights(policy=1.0, kl=0.1))
        found["update"] = seconds(lambda batch=batch, step=step: actor.update([batch], step))
        rounds.append(found)
    return {part: statistics.median(r[part] for r in rounds[1:]) for part in PARTS}


def counts(a: Architecture, work: Work) -> dict[str, float]:
    """Operations of each part."""
    return {
        "prefill": cost_model.prefill_flops(a, work),
        "decode": cost_model.decode_flops(a, work),
        "reference": cost_model.forward_flops(a, work),
        "update": cost_model.update_flops(a, work, checkpointing=False),
    }


def main() -> None:
    torch.set_num_threads(1)
    start_distributed()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        save_tokenizer(folder)
        a = parse_architecture(config.to_dict())
        measured = [measure(folder, work) for work in SHAPES]
    first = counts(a, SHAPES[0])
    rates = {part: first[part] / measured[0][part] for part in PARTS}
    print("rates of the first shape, GFLOP/s: " + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in rates.items()))
    # One rate for large products, taken where most of the time is; one for the skinny products of decoding.
    large, skinny = rates["update"], rates["decode"]
    for work, found in zip(SHAPES, measured, strict=True):
        expected = {k: v / (skinny if k == "decode" else large) for k, v in counts(a, work).items()}
        cells = [f"{k} {expected[k]:.2f} / {found[k]:.2f} ({expected[k] / found[k] - 1:+.0%})" for k in PARTS]
        total = sum(expected.values()) / sum(found.values()) - 1
        print(
            f"N {work.prompts} G {work.group} P {work.prompt} R {work.response}: {', '.join(cells)}, sum {total:+.0%}"
        )


if __name__ == "__main__":
    main()
