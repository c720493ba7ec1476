"""Stage 0: continued pre-training of the student on raw text (data.text), before anything else.

    bash slurm/run_stage0_pretrain.sh
    deepspeed training/pretrain.py --config configs/gemma3_27b_mistral_7b.yaml --data.text faroese.jsonl \\
        --data.text_block_tokens 512 --sft.steps 1000

The L_PT term alone, in the same engine as the other stages; steps, batch (blocks a step, over all ranks), learning rate
and output are those of `sft` in the configuration. Every twentieth block is held out; how many bits the model needs for
a byte of those, before and after, is printed and written to runs/NAME/summary.json. The same command again continues
where the run stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.checks import require
from configs.io.loading import loading
from training.run.cli import fail, leave, parse_supervised


def main(argv: list[str]) -> int:
    """Parse, check, train. Heavy libraries load only after the arguments are known to be good."""
    config = parse_supervised(argv, "Stage 0: continued pre-training on raw text.", "pretrain")
    try:
        require(config.data.text is not None, "data.text", None, "give raw text: a file with a `text` in each row")
    except ValueError as error:
        fail(str(error))
    with loading():
        from training.supervised import learn_text, read_text, run_stage

    return run_stage(0, config, read_text, learn_text)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
