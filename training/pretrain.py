"""Stage 0: continued pre-training of the student on raw text (data.text), before anything else.

    bash slurm/run_stage0_pretrain.sh
    deepspeed training/pretrain.py --config configs/gemma3_27b_mistral_7b.yaml --data.text faroese.jsonl \\
        --data.text_block_tokens 512 --sft.steps 1000

The L_PT term alone, in the same engine as the other stages; steps, batch (blocks a step, over all ranks), learning rate
and output are those of `sft` in the configuration. Every twentieth block is held out; how many bits the model needs for
a byte of those, before and after, is printed and written to runs/NAME/summary.json. The same command again goes on
where the run stopped.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.schema import DEMO, RunConfig, require, validate
from training.cli import DEMO_CONFIGS, fail, parse
from training.sft import open_run, run_stage, train_supervised

if TYPE_CHECKING:
    from inference.packing import Group
    from training.actor import Actor
    from training.stopping import StopRequest

HELD_OUT_EVERY = 20
"""Blocks of which one is held out."""


def main(argv: list[str]) -> int:
    """Parse, check, train."""
    config = parse(argv, "Stage 0: continued pre-training on raw text.", lambda _: DEMO_CONFIGS / "sft.yaml")
    try:
        validate(config)
        require(config.data.text is not None, "data.text", None, "give raw text: a file with a `text` in each row")
    except ValueError as error:
        fail(str(error))
    return run_stage(run, config)


def run(config: RunConfig, stop: StopRequest) -> int:
    """Run stage 0; returns the exit code."""
    import numpy as np
    from transformers import AutoTokenizer

    from training import distributed
    from training.deepspeed_engine import start_distributed
    from training.demo import resolve_demo
    from training.preflight import blocks_of, check_files, with_model_directories
    from training.run import quiet_logging, set_threads
    from training.text import Picked

    quiet_logging()
    try:
        config = with_model_directories(config)
        check_files(config)
        set_threads(config)
        if DEMO in (config.student.path, config.data.text):
            config = resolve_demo(config, stage=1)
        tokenizer = AutoTokenizer.from_pretrained(config.student.path)
        blocks = blocks_of(config, tokenizer, int(tokenizer.eos_token_id))
        places = np.arange(1, len(blocks) + 1)
        held = Picked(blocks, np.flatnonzero(places % HELD_OUT_EVERY == 0))
        text = Picked(blocks, np.flatnonzero(places % HELD_OUT_EVERY))
        require(
            len(held) > 0,
            "data.text",
            config.data.text,
            f"gives {len(blocks)} blocks; {HELD_OUT_EVERY} are needed at least",
        )
        require(
            config.sft.batch <= len(text), "sft.batch", config.sft.batch, f"is more than {len(text)} blocks of text"
        )
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))
    start_distributed()
    bits = fit(config, text, held, stop)
    if bits is None:
        return stop.exit_code
    before, after = bits
    if distributed.is_main():
        print(f"stage 0: held-out bits a byte {before:.4f} before, {after:.4f} after", flush=True)
    return 0


def fit(
    config: RunConfig, text: Sequence[Sequence[Group]], held: Sequence[Sequence[Group]], stop: StopRequest
) -> tuple[float, float] | None:
    """Train on blocks of text and export; returns held-out bits a byte before and after, None where it was stopped.
    Collective."""
    import torch

    from training import distributed
    from training.actor import Actor
    from training.composite import LossWeights, UpdateInput
    from training.text import flat

    run = open_run(config, "pretrain")
    torch.manual_seed(config.seed)
    actor = Actor(config, config.student.path, total_steps=config.sft.steps, learning_rate=config.sft.learning_rate)
    measured = run.folder.read_json("eval/before.json")
    distributed.barrier()
    if measured is None:
        measured = {"bits_per_byte": bits_per_byte(actor, config, held)}
        if distributed.is_main():
            run.folder.write_json("eval/before.json", measured)
    before = float(measured["bits_per_byte"])
    if not train_supervised(
        actor, config, run, text, lambda mine: UpdateInput(None, flat(mine), [], LossWeights(pt=1.0)), stop, stage=0,
        term="pt",
    ):  # fmt: skip
        return None
    after = bits_per_byte(actor, config, held)
    if distributed.is_main():
        run.folder.write_json(
            "summary.json",
            {
                "status": "finished",
                "steps": config.sft.steps,
                "bits_per_byte_before": before,
                "bits_per_byte_after": after,
                "held_out_blocks": len(held),
                "data": config.data.text,
            },
        )
        run.folder.close()
    return before, after


def bits_per_byte(actor: Actor, config: RunConfig, blocks: Sequence[Sequence[Group]]) -> float:
    """Bits that the student needs for a byte of the blocks' text behind each one's first token; the end symbols cost
    bits and are no bytes. Collective."""
    import torch

    from inference.packing import pack
    from training import distributed
    from training.data import share_of_rank
    from training.deepspeed_engine import in_step
    from training.text import flat

    mine = flat(share_of_rank(blocks, distributed.rank(), distributed.world_size()))
    nats = 0.0
    with torch.no_grad():
        for row, used in in_step(pack(mine, config.actor.micro_batch_tokens)):
            nats -= float(actor.policy(row.to(actor.engine.device)).logprobs_S.double().sum()) * used
    texts = actor.tokenizer.batch_decode([list(b.responses[0]) for b in mine], skip_special_tokens=True)
    total = distributed.sum_metrics({"nats": nats, "bytes": float(sum(len(text.encode()) for text in texts))})
    return total["nats"] / math.log(2) / max(total["bytes"], 1.0)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
