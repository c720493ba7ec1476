"""TRL's side of bench_step.py: GRPOTrainer with a teacher-log-probability reward, or DistillationTrainer; a step each
time it is told to.

Started by bench_step.py with TRL's folder on PYTHONPATH. The teacher is a Hugging Face model in this process over plain
padded rows: for GRPOTrainer with logits at the response tokens only, for DistillationTrainer (on-policy, chunked
generalised JSD) as TRL runs it. Settings are the fastest that TRL has on a CPU (no gradient checkpointing, fused AdamW,
the frozen models in the student's type).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import step_shared as shared
import torch
import transformers
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer


class Turns(transformers.TrainerCallback):
    """Waits for its turn before a step and reports after it: what is neither sampling nor scoring is the update."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def timed(self, owner: Any, method: str, phase: str) -> None:
        """Count the seconds of `owner.method` to a phase."""
        work = getattr(owner, method)

        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                self.spent[phase] = self.spent.get(phase, 0.0) + time.perf_counter() - start

        setattr(owner, method, run)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        shared.wait_for_turn()
        self.spent.clear()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds, spent = time.perf_counter() - self.start, self.spent
        sample = spent["sample"]
        score = spent["score"] if "score" in spent else spent["sample and score"] - sample
        phases = {"sample": sample, "score": score, "update": seconds - sample - score}
        shared.report({**phases, "seconds": seconds, "memory_gb": shared.peak_gb()})


class TeacherReward:
    """Mean log-probability of a response's tokens under the teacher."""

    __name__ = "teacher_logprob"

    def __init__(self, teacher: Any, response: int) -> None:
        self.teacher, self.response = teacher, response
        self.seconds = 0.0

    @torch.no_grad()
    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        if any(len(ids) != self.response for ids in completion_ids):
            raise RuntimeError("a response is not as long as the benchmark wants it")
        prompt_ids = [[int(word[1:]) for word in prompt.split()] for prompt in prompts]
        ids = torch.tensor([[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)])
        kept = self.response + 1
        logits = self.teacher(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=kept).logits
        logprobs = logits[:, :-1].float().log_softmax(-1)
        return logprobs.gather(-1, ids[:, -self.response :, None])[..., 0].mean(1).tolist()


def common(options: argparse.Namespace, output: str, batch: int, response: int) -> dict[str, Any]:
    """Settings that both trainers have."""
    return {
        "output_dir": output, "per_device_train_batch_size": batch, "max_steps": options.rounds + 1,
        "max_completion_length": response, "temperature": shared.TEMPERATURE, "top_p": 1.0, "top_k": 0,
        "learning_rate": shared.LEARNING_RATE, "adam_beta1": shared.BETAS[0], "adam_beta2": shared.BETAS[1],
        "weight_decay": 0.0, "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "optim": "adamw_torch_fused",
        "gradient_checkpointing": False, "use_cpu": True, "bf16": options.dtype == "bfloat16",
        "model_init_kwargs": {"dtype": options.dtype}, "shuffle_dataset": False, "report_to": [],
        "save_strategy": "no", "generation_kwargs": {"min_new_tokens": response}, "disable_tqdm": True,
        "logging_steps": 10**6, "dataloader_pin_memory": False,
    }  # fmt: skip


def grpo(options: argparse.Namespace, output: str, turns: Turns) -> GRPOTrainer:
    """GRPO with a KL to the reference; TRL makes the group of each prompt."""
    models, response = Path(options.models), shared.SHAPES[options.shape][1]
    teacher = transformers.AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=options.dtype).eval()
    settings = common(options, output, options.prompts * shared.GROUP, response)
    trainer = GRPOTrainer(
        model=str(models / "student"),
        reward_funcs=TeacherReward(teacher, response),
        args=GRPOConfig(**settings, num_generations=shared.GROUP, beta=shared.KL_COEF),
        train_dataset=Dataset.from_list(rows(options, 1)),
        callbacks=[turns],
    )
    turns.timed(trainer, "_generate_and_score_completions", "sample and score")
    return trainer


def distillation(options: argparse.Namespace, output: str, turns: Turns) -> DistillationTrainer:
    """One response a prompt is what it has, so that a group is its prompt as often as the group has responses."""
    models, response = Path(options.models), shared.SHAPES[options.shape][1]
    settings = common(options, output, options.prompts * shared.GROUP, response)
    trainer = DistillationTrainer(
        model=str(models / "student"),
        teacher_model=str(models / "teacher"),
        args=DistillationConfig(
            **settings, beta=shared.JSD_BETA, teacher_model_init_kwargs={"dtype": options.dtype}
        ),
        train_dataset=Dataset.from_list(rows(options, shared.GROUP)),
        callbacks=[turns],
    )  # fmt: skip
    turns.timed(trainer.teacher_model.base_model, "forward", "score")
    return trainer


def rows(options: argparse.Namespace, times: int) -> list[dict[str, str]]:
    """The prompts of all rounds, each as often as told."""
    steps = [shared.prompt_tokens(options.shape, options.prompts, i) for i in range(options.rounds + 1)]
    return [{"prompt": shared.prompt_text(tokens)} for step in steps for tokens in step for _ in range(times)]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("models", "shape", "dtype", "rival"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("threads", "rounds", "prompts"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    turns = Turns()
    with tempfile.TemporaryDirectory() as output:
        trainer = (distillation if options.rival == "distillation" else grpo)(options, output, turns)
        turns.timed(trainer, "_generate", "sample")
        trainer.train()


if __name__ == "__main__":
    main()
