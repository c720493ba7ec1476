"""TRL's side of bench_step.py: GRPOTrainer with a teacher-log-probability reward; a step each time it is told to.

Started by bench_step.py with TRL's folder on PYTHONPATH. The teacher is a Hugging Face model in this process over plain
padded rows, with logits at the response tokens only; settings are the fastest that TRL has on a CPU (no gradient
checkpointing, fused AdamW, the frozen models in the student's type).
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
from trl import GRPOConfig, GRPOTrainer


class Turns(transformers.TrainerCallback):
    """Waits for its turn before a step and reports after it."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        shared.wait_for_turn()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        shared.report({"seconds": time.perf_counter() - self.start, "memory_gb": shared.peak_gb()})


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


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("models", "shape", "dtype"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("threads", "rounds", "prompts"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    response = shared.SHAPES[options.shape][1]
    load = dict(dtype=getattr(torch, options.dtype))
    models = Path(options.models)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(models / "teacher", **load).eval()
    steps = options.rounds + 1
    prompts = [shared.prompt_tokens(options.shape, options.prompts, step) for step in range(steps)]
    rows = [{"prompt": shared.prompt_text(tokens)} for step in prompts for tokens in step]
    with tempfile.TemporaryDirectory() as output:
        config = GRPOConfig(
            output_dir=output, per_device_train_batch_size=options.prompts * shared.GROUP, max_steps=steps,
            num_generations=shared.GROUP, max_completion_length=response, temperature=shared.TEMPERATURE, top_p=1.0,
            top_k=0, beta=shared.KL_COEF, learning_rate=shared.LEARNING_RATE, adam_beta1=shared.BETAS[0],
            adam_beta2=shared.BETAS[1], weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type="constant",
            optim="adamw_torch_fused", gradient_checkpointing=False, use_cpu=True, bf16=options.dtype == "bfloat16",
            model_init_kwargs={"dtype": options.dtype}, shuffle_dataset=False, report_to=[], save_strategy="no",
            generation_kwargs={"min_new_tokens": response}, disable_tqdm=True, logging_steps=10**6,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=str(models / "student"), reward_funcs=TeacherReward(teacher, response), args=config,
            train_dataset=Dataset.from_list(rows), callbacks=[Turns()],
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    main()
