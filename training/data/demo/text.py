"""Faroese text of the demo that no model was trained on, to measure perplexity and language on.

Made by the generator of the raw text with another seed; what the raw text has, a text that is asked about, and a
sentence that states a held-out fact are left out. A file of its own, so that the demo itself stays as it is.

    python training/data/demo/text.py runs/ablation/heldout-text.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from training.data.demo.sentences import build_demo_data, build_text, split_facts, write_jsonl

TEXT_SEED = 1
ROWS = 400


def heldout_text(rows: int = ROWS) -> list[str]:
    """`rows` sentences and little stories that are not in the demo's raw text."""
    data = build_demo_data()
    contexts = frozenset(row.context for row in [*data.warmup, *data.rl, *data.heldout])
    seen = set(data.text)
    texts = [text for text in build_text(split_facts(0)["heldout"], contexts, TEXT_SEED) if text not in seen]
    return texts[:rows]


if __name__ == "__main__":
    write_jsonl(Path(sys.argv[1]), ({"text": text} for text in heldout_text()))
