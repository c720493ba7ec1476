"""What EuroEval's FoNE costs through our generation, beside `generate` for one row after the other.

    GRPO_KD_MODELS=DIR python tests/benchmarks/bench_euroeval.py [--rows 24] [--threads 2]

SmolLM2-135M (DIR/smollm2-135m), float32, on the CPU; the demo's sentences, 8 examples, one iteration. First the whole
harness: its prompts, our generation with the examples computed once, its labels and metrics, everything but loading the
model. Then, prompt by prompt in turns, Hugging Face's `generate` with the same stops and our generation with nothing
shared. Last the goals of docs/benchmarks.md; exit code 1 if one fails. Needs the extra `eval`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import StoppingCriteriaList, StopStringCriteria

from eval.euroeval import model as euroeval_model
from eval.euroeval.model import Engine, SamplingParams
from eval.euroeval.run import Settings, evaluate
from eval.measures.generation import generate
from eval.measures.model import Model
from training.data.demo.splits import write_demo_splits

SHARED, ALONE = 2.0, 0.6
"""Least tokens a second, times those of `generate`: of the harness, and of our generation with nothing shared."""


class WatchedEngine(Engine):
    """Notes what the harness asked, and what it was told."""

    asked: tuple[Sequence[str], SamplingParams, list[SimpleNamespace], Any] | None = None

    def generate(
        self, prompts: Sequence[str], sampling_params: SamplingParams, use_tqdm: Any = None, lora_request: Any = None
    ) -> list[SimpleNamespace]:
        outputs = super().generate(prompts, sampling_params, use_tqdm, lora_request)
        if use_tqdm:  # not EuroEval's look at what the model says to "Hello"
            type(self).asked = (prompts, sampling_params, outputs, self)
        return outputs


def plain(engine: Any, prompt: str, params: SamplingParams) -> list[int]:
    """One row by Hugging Face's `generate`, with the harness's stops."""
    ids = torch.tensor([engine.encode(prompt)])
    strings = [text for text in params.stop if text]
    output = engine.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=params.max_tokens,
        stopping_criteria=StoppingCriteriaList([StopStringCriteria(engine.tokenizer, strings)]),
        pad_token_id=engine.tokenizer.eos_token_id,
    )
    return output[0, ids.shape[1] :].tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(os.environ.get("GRPO_KD_MODELS", "models")) / "smollm2-135m")
    parser.add_argument("--rows", type=int, default=24, help="rows of the test split")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    euroeval_model.Engine = WatchedEngine  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_demo_splits(work / "splits")
        test = work / "splits" / "fone" / "test.jsonl"
        test.write_text("".join(line + "\n" for line in test.read_text().splitlines()[: options.rows]))
        settings = Settings(
            tasks=("fone",), source="local", folder=work / "splits", cache_dir=work / "cache", iterations=1
        )
        start = time.process_time()
        evaluate(Model(path=str(options.model), runs_dir=work / "runs"), settings)
        shutil.rmtree(work / "cache", ignore_errors=True)
        spent = time.process_time() - start
    assert WatchedEngine.asked is not None
    prompts, params, outputs, engine = WatchedEngine.asked
    decoding = engine._decoding(params)
    spent_alone, spent_plain, alone, plain_ones = 0.0, 0.0, [], []
    for prompt in prompts:
        begin = time.process_time()  # on a busy machine the fair measure
        plain_ones.append(plain(engine, prompt, params))
        spent_plain, begin = spent_plain + time.process_time() - begin, time.process_time()
        alone += generate(engine.model, [engine.encode(prompt)], decoding)
        spent_alone += time.process_time() - begin
    ours = [output.outputs[0].token_ids for output in outputs]
    same = sum(a == b == c.tokens for a, b, c in zip(plain_ones, ours, alone, strict=True))
    lengths = [len(engine.encode(prompt)) for prompt in prompts]
    print(f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {sum(map(len, ours))} generated")
    print(f"seconds of the processor, threads {options.threads}: harness with loading {spent:.1f}, `generate` "
          f"{spent_plain:.1f}, ours with nothing shared {spent_alone:.1f}")  # fmt: skip
    print(f"the same tokens in all three: {same} of {len(prompts)}")
    shared, single = spent_plain / spent, spent_plain / spent_alone
    passed = shared >= SHARED and single >= ALONE
    print(f"{'PASS' if passed else 'FAIL'}: times `generate`'s speed {shared:.2f} (goal {SHARED}), with nothing shared "
          f"{single:.2f} (goal {ALONE})")  # fmt: skip
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
