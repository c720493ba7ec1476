"""Our side of bench_step.py: the actor, the reference and the teacher's server as a run has them; a step at a time.

Started by bench_step.py. One rank, ZeRO 0 (nothing is shared out among one rank), the teacher in a process of its own
(one tensor-parallel rank, as `inference/server/launch.py` starts it), the trainer waiting while it works. After each
step the matrix products of its phases alone are timed: the floors.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)
sys.path.append(str(Path(__file__).resolve().parent))

import step_shared as shared
import torch
import torch.nn.functional as F

from configs.schema import (
    ActorConfig,
    DataConfig,
    DistillConfig,
    LossConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    StudentConfig,
    TeacherConfig,
)
from inference.client import TeacherClient
from inference.protocol.fingerprint import tokenizer_fingerprint
from inference.server.launch import start_local_teacher
from training.collect import reward
from training.experience import Experience, Prompt, Scored
from training.grpo import grpo_advantages
from training.objective import LossWeights, UpdateInput
from training.recipes import RECIPES, no_advantages
from training.student.actor import Actor
from training.student.deepspeed_engine import start_distributed
from training.student.reference import FrozenCopy
from training.teacher.facts import teacher_facts
from training.teacher.link import TeacherLink


class Phases:
    """Seconds of each phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class OneStep:
    """A run's models, and one GRPO step on them."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack) -> None:
        folder = Path(options.models)
        self.config = config = run_config(options, folder)
        local = start_local_teacher(config.teacher, folder / "teacher", folder / "server")
        stack.callback(local.stop)
        self.teacher_pid = local.process.pid
        facts = teacher_facts(config, config.teacher)
        client = TeacherClient(
            local.address, secret=local.secret, tokenizer_fingerprint=tokenizer_fingerprint(folder / "student"),
            timeout_s=600.0,
        )  # fmt: skip
        self.distils = config.recipe == "gkd"
        self.actor = Actor(
            config, total_steps=10**6, learning_rate=config.actor.learning_rate,
            teacher_head=facts.head() if self.distils else None,
        )  # fmt: skip
        self.actor.end_tokens = ()  # every response goes on to its last token
        self.link = TeacherLink(client, facts, self.actor.teacher_head)
        stack.callback(client.close)
        self.reference = None if self.distils else FrozenCopy(config, self.actor.engine.device)

    def run(self, prompts: list[tuple[int, ...]], step: int) -> dict[str, float]:
        """One step; seconds by phase and of the whole."""
        config, phases, started = self.config, Phases(), time.perf_counter()
        asked = [Prompt(i, shared.prompt_text(p), p, (), "") for i, p in enumerate(prompts)]
        prefilled = [0.0]

        def on_step(t: int) -> None:
            if t == 0:
                prefilled[0] = time.perf_counter()

        self.actor.on_step = on_step
        with phases("decode"):
            start = time.perf_counter()
            rollout = self.actor.sample(asked, step=step)
        phases.seconds["prefill"] = prefilled[0] - start
        phases.seconds["decode"] -= phases.seconds["prefill"]
        with phases("teacher"):
            view = self.link.ask(rollout, whole_distribution=self.distils)()
        with phases("reference"):
            reference_S = self.reference.logprobs(rollout) if self.reference else None
        rewarded = reward(config, Scored(rollout, view, reference_logprobs_S=reference_S), LossWeights())
        if self.distils:
            advantages_S, _ = no_advantages(rewarded, config, 0.0)
        else:
            advantages_S = grpo_advantages(rewarded.reward, rollout.lengths_B, rollout.group_size, config.grpo)
        experience = Experience(rewarded, advantages_S, None)
        with phases("update"):
            weights = RECIPES[config.recipe].weights(config, step, same_tokenizer=True)
            metrics = self.actor.update([UpdateInput(experience, (), (), weights)], step)
        assert {len(r) for r in rollout.responses_B} == {config.sampling.max_new_tokens}
        assert not metrics["skipped"]
        mismatch = {key: value for key, value in metrics.items() if key.startswith("mismatch/")}
        return {**phases.seconds, "seconds": time.perf_counter() - started, **mismatch}


def run_config(options: argparse.Namespace, folder: Path) -> RunConfig:
    prompt, response = shared.SHAPES[options.shape]
    return RunConfig(
        recipe="gkd" if options.rival == "distillation" else "rl",
        threads=options.threads,
        student=StudentConfig(path=str(folder / "student"), dtype=options.dtype),
        teacher=TeacherConfig(
            path=str(folder / "teacher"), dtype=options.dtype, tensor_parallel=1, threads=options.threads
        ),
        data=DataConfig(text=None, max_prompt_tokens=prompt),
        reward="teacher_logprob",
        sampling=SamplingConfig(
            group_size=shared.GROUP, max_new_tokens=response, temperature=shared.TEMPERATURE
        ),
        loss=LossConfig(kl_coef=shared.KL_COEF),
        distill=DistillConfig(jsd_beta=shared.JSD_BETA),
        rewards=RewardConfig(),
        actor=ActorConfig(learning_rate=shared.LEARNING_RATE, zero_stage=0),
    )  # fmt: skip


class Floors:
    """The matrix products of each phase alone: every linear layer at the phase's tokens, the output layer where
    something is predicted; same weights, shapes and type, nothing in between."""

    def __init__(self, step: OneStep, options: argparse.Namespace) -> None:
        model = step.actor.policy.model
        self.output = model.get_output_embeddings().weight
        self.layers = [
            m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight is not self.output
        ]
        self.distils, self.prompts = step.distils, options.prompts
        self.prompt, self.response = shared.SHAPES[options.shape]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Seconds of each phase's products."""
        N, B, R = self.prompts, self.prompts * shared.GROUP, self.response
        packed = N * self.prompt + B * (R - 1)
        forward = seconds(lambda: self._forward(packed, B * R))
        return {
            "prefill": seconds(lambda: self._forward(N * self.prompt, N)),
            "decode": seconds(lambda: self._decode(B, R - 1)),
            "teacher": forward,
            **({} if self.distils else {"reference": forward}),
            "update": seconds(lambda: self._update(packed, B * R)),
        }

    def _inputs(self, rows: int) -> dict[int, torch.Tensor]:
        widths = {w.shape[1] for w in self.layers} | {w.shape[0] for w in self.layers} | {self.output.shape[1]}
        return {width: torch.randn(rows, width).to(self.output.dtype) for width in widths}

    def _forward(self, tokens: int, predicted: int) -> None:
        x = self._inputs(tokens)
        for weight in self.layers:
            F.linear(x[weight.shape[1]], weight)
        F.linear(x[self.output.shape[1]][:1].expand(predicted, -1).contiguous(), self.output)

    def _decode(self, rows: int, steps: int) -> None:
        x = self._inputs(rows)
        for _ in range(steps):
            for weight in self.layers:
                F.linear(x[weight.shape[1]], weight)
            F.linear(x[self.output.shape[1]], self.output)

    def _update(self, tokens: int, predicted: int) -> None:
        """Forward, and in the backward pass the gradient of the input and of the weight."""
        x = self._inputs(tokens)
        for weight in self.layers:
            F.linear(x[weight.shape[1]], weight)
        hidden = x[self.output.shape[1]][:1].expand(predicted, -1).contiguous()
        logits = F.linear(hidden, self.output)
        if self.distils:  # the teacher's, of the same shape
            F.linear(hidden, self.output)
        logits @ self.output
        logits.T @ hidden
        for weight in reversed(self.layers):
            gradient, inputs = x[weight.shape[0]], x[weight.shape[1]]
            gradient @ weight
            gradient.T @ inputs


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("models", "shape", "dtype", "rival"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("threads", "rounds", "prompts"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start_distributed()
    with ExitStack() as stack:
        step = OneStep(options, stack)
        floors = Floors(step, options)
        for i in range(options.rounds + 1):
            shared.wait_for_turn()
            timed = step.run(shared.prompt_tokens(options.shape, options.prompts, i), i)
            memory = {"trainer": shared.peak_gb(), "teacher": shared.peak_gb(step.teacher_pid)}
            shared.report({**timed, "memory_gb": sum(memory.values()), "memory": memory, "floors": floors.measure()})


if __name__ == "__main__":
    main()
