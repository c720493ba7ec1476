"""What a step costs: tokens, floating-point operations, bytes over memory, links and wire, and from them seconds.

    python training/cost_model.py

prints the table of docs/scaling.md: 7B from 27B and from 70B on 1 to 1,000 cards. Counts are exact for texts of the
given lengths (tests/test_cost_model.py holds them against the real packing, wire format and matrix products); seconds
are counts divided by rates, which are either measured or assumed (docs/scaling.md says which).

Symbols: N prompts, G responses to each, B = N*G, P prompt tokens, R response tokens, L layers, D hidden size, V
vocabulary, W trainer ranks, b bytes of a number.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from inference.families import Architecture, parse_architecture
from inference.wire import HEADER_WORDS

WORD = 8
"""Bytes of an integer on the wire."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step's texts; every one has the same length."""

    prompts: int
    """N."""
    group: int = 8
    """G."""
    prompt: int = 400
    """P, tokens."""
    response: int = 32
    """R, tokens."""

    @property
    def responses(self) -> int:
        """B."""
        return self.prompts * self.group

    @property
    def predicted(self) -> int:
        """Response tokens: each is sampled, scored and trained on once."""
        return self.responses * self.response

    @property
    def packed(self) -> int:
        """Tokens of the packed rows: each prompt once, the last token of a response is only predicted."""
        return self.prompts * self.prompt + self.responses * (self.response - 1)


def layer_weights(a: Architecture) -> int:
    """Elements of the matrices of all layers."""
    attention = a.hidden_size * a.head_dim * (2 * a.heads + 2 * a.kv_heads)
    mlp = (3 if a.gated else 2) * a.hidden_size * a.ffn_size
    return len(a.layers) * (attention + mlp)


def output_weights(a: Architecture) -> int:
    """Elements of the output layer."""
    return a.vocab_size * a.hidden_size


def weights(a: Architecture) -> int:
    """Elements of all matrices, embedding included."""
    return layer_weights(a) + (1 if a.tied else 2) * output_weights(a)


def seen(first: int, last: int, window: int | None) -> int:
    """Keys that the queries at positions first .. last - 1 see together: position i sees min(i + 1, window)."""

    def upto(n: int) -> int:
        w = n if window is None else min(n, window)
        return w * (w + 1) // 2 + (n - w) * w

    return upto(last) - upto(first)


def forward_flops(a: Architecture, work: Work, *, predict: bool = True) -> float:
    """One pass over the packed rows: products with the layers, attention, and the output layer where `predict`."""
    last = work.prompt + work.response - 1
    pairs = sum(
        seen(0, work.prompt, layer.window) + work.group * seen(work.prompt, last, layer.window) for layer in a.layers
    )
    attention = 4 * a.heads * a.head_dim * pairs * work.prompts
    return 2.0 * layer_weights(a) * work.packed + attention + 2.0 * output_weights(a) * work.predicted * predict


def update_flops(a: Architecture, work: Work, *, checkpointing: bool) -> float:
    """Forward and backward (twice a forward), and the forward pass of the layers again with checkpointing."""
    again = forward_flops(a, work, predict=False) if checkpointing else 0.0
    return 3.0 * forward_flops(a, work) + again


def prefill_flops(a: Architecture, work: Work) -> float:
    """Each prompt once; logits of its last token alone."""
    pairs = sum(seen(0, work.prompt, layer.window) for layer in a.layers)
    products = layer_weights(a) * work.prompt + output_weights(a)
    return work.prompts * (2.0 * products + 4.0 * a.heads * a.head_dim * pairs)


def decode_flops(a: Architecture, work: Work) -> float:
    """All decoding steps of all responses; the first token comes from the prefill."""
    pairs = sum(seen(work.prompt, work.prompt + work.response - 1, layer.window) for layer in a.layers)
    products = (layer_weights(a) + output_weights(a)) * (work.response - 1)
    return work.responses * (2.0 * products + 4.0 * a.heads * a.head_dim * pairs)


def decode_bytes(a: Architecture, work: Work, b: int = 2) -> float:
    """Bytes read by all decoding steps: the weights in each, a prompt's cache once for its group, each suffix."""
    token = 2 * len(a.layers) * a.kv_heads * a.head_dim * b
    steps = work.response - 1
    caches = work.prompts * work.prompt * steps + work.responses * steps * (steps + 1) // 2
    return float((layer_weights(a) + output_weights(a)) * b * steps + token * caches)


def request_bytes(work: Work) -> int:
    """A `score` or `hidden` request for these texts, header included."""
    lengths = 2 * work.prompts + work.responses
    return WORD * (HEADER_WORDS + lengths + work.prompts * work.prompt + work.predicted)


def reply_bytes(work: Work, hidden_size: int = 0, b: int = 2) -> int:
    """Its reply: a float32 a response token, or with `hidden_size` the teacher's last hidden states."""
    return WORD * HEADER_WORDS + work.predicted * (hidden_size * b if hidden_size else 4)


def exchange_bytes(size: int, ranks: int, zero: int, passes: int, forwards: int, b: int = 2) -> float:
    """Bytes that each trainer rank sends a step. `size`: parameters; `passes`: forward and backward; `forwards`:
    forward passes of sampling, which under ZeRO 3 gather the weights as well."""
    share = size * b * (ranks - 1) / ranks
    if zero < 3:
        return 2.0 * share  # gradients reduced to their owners, weights back
    return share * (3.0 * passes + forwards)


@dataclass(frozen=True, kw_only=True)
class Card:
    """Rates that are reached, not peaks."""

    flops: float
    """Operations a second in large matrix products."""
    memory: float
    """Bytes a second read by skinny products."""
    near: float
    """Bytes a second to each card of the same node, one direction."""
    far: float
    """Bytes a second to other nodes, one direction, for each card."""
    step_s: float
    """Seconds of a decoding step besides its products: launches, the choice of the token."""
    node: int = 8
    """Cards of a node."""
    bytes: float = 80e9
    """Memory."""


H100 = Card(flops=0.4 * 989e12, memory=0.6 * 3.35e12, near=0.7 * 450e9, far=0.8 * 50e9, step_s=5e-3)
"""H100 SXM with 400 Gb/s InfiniBand a card: NVIDIA's peaks times shares that are assumed, not measured."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the cards are shared out."""

    ranks: int
    """W."""
    zero: int
    """ZeRO stage of the student."""
    tensor_parallel: int
    """Cards of one teacher."""
    teachers: int
    """Replicas of it."""
    micro_batch_tokens: int = 8192

    @property
    def cards(self) -> int:
        """All of them."""
        return self.ranks + self.tensor_parallel * self.teachers


def rank_bytes(student: Architecture, layout: Layout) -> float:
    """Roughly what a rank holds in bfloat16 with Adam and a whole reference; `--plan` counts it exactly."""
    size, buffers, moment = weights(student), 4e9, 8e9
    kept = 16 * size / layout.ranks if layout.zero == 3 else 4 * size + 12 * size / layout.ranks
    return kept + 2 * size + buffers + moment


def step_seconds(student: Architecture, teacher: Architecture, work: Work, layout: Layout, card: Card, *,
                 hidden: bool) -> dict[str, float]:  # fmt: skip
    """Seconds by part of a step. `hidden`: the teacher sends hidden states (one tokenizer), not log-probabilities.

    The teacher works while the reference does; the other parts follow one another.
    """
    mine = replace(work, prompts=-(-work.prompts // layout.ranks))
    asked = replace(work, prompts=-(-work.prompts // layout.teachers))
    link = card.near if layout.ranks <= card.node else card.far
    passes = max(1, -(-mine.packed // layout.micro_batch_tokens))
    sent = exchange_bytes(weights(student), layout.ranks, layout.zero, passes, 0)
    gathered = exchange_bytes(weights(student), layout.ranks, layout.zero, 0, work.response) if layout.zero == 3 else 0
    tp = layout.tensor_parallel
    reductions = 4.0 * len(teacher.layers) * asked.packed * teacher.hidden_size * 2 * (tp - 1) / tp
    wire = request_bytes(asked) + reply_bytes(asked, teacher.hidden_size if hidden else 0)
    whole = 8.0 * output_weights(teacher) * mine.predicted if hidden else 0.0  # its output layer at the student's side
    return {
        "prefill": prefill_flops(student, mine) / card.flops,
        "decode": max(decode_bytes(student, mine) / card.memory, decode_flops(student, mine) / card.flops)
        + card.step_s * work.response,
        "weights gathered to sample": gathered / link,
        "reference": forward_flops(student, mine) / card.flops,
        "teacher": forward_flops(teacher, asked, predict=not hidden) / tp / card.flops + reductions / card.near,
        "wire": wire / card.far,
        "update": (update_flops(student, mine, checkpointing=True) + whole) / card.flops,
        "exchange": sent / link,
    }


def whole_step(parts: dict[str, float]) -> float:
    """Seconds of the step."""
    beside = max(parts["reference"], parts["teacher"] + parts["wire"])
    return sum(v for k, v in parts.items() if k not in ("reference", "teacher", "wire")) + beside


def bottleneck(parts: dict[str, float]) -> str:
    """The longest part; the reference and the teacher as far as they are waited for."""
    served = parts["teacher"] + parts["wire"]
    waited = {k: v for k, v in parts.items() if k not in ("reference", "teacher", "wire")}
    waited["teacher" if served > parts["reference"] else "reference"] = max(served, parts["reference"])
    return max(waited, key=lambda k: waited[k])


def layouts(student: Architecture, work: Work, cards: int, tensor_parallel: int, card: Card) -> Iterator[Layout]:
    """Every way to share out at most so many cards that fits into their memory; ranks share the prompts evenly."""
    for ranks in (n for n in range(1, min(work.prompts, cards - tensor_parallel) + 1) if work.prompts % n == 0):
        for zero in (1, 3):
            for teachers in range(1, (cards - ranks) // tensor_parallel + 1):
                layout = Layout(ranks=ranks, zero=zero, tensor_parallel=tensor_parallel, teachers=teachers)
                if rank_bytes(student, layout) <= 0.95 * card.bytes - 2e9 and teachers <= ranks:
                    yield layout


PAIRS = {
    "7B from 27B": ("mistral_7b", "gemma3_27b", 1, False),
    "7B from 70B": ("llama2_7b", "llama2_70b", 4, True),
}
"""Student, teacher, cards of one teacher (of 80 GB: docs/planning.md), whether they share a tokenizer."""
SHAPES = {
    "mistral_7b": dict(model_type="mistral", vocab_size=32768, hidden_size=4096, intermediate_size=14336,
                       num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                       sliding_window=None),
    "llama2_7b": dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                      num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
    "llama2_70b": dict(model_type="llama", vocab_size=32000, hidden_size=8192, intermediate_size=28672,
                       num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8),
    "gemma3_27b": dict(model_type="gemma3_text", vocab_size=262208, hidden_size=5376, intermediate_size=21504,
                       num_hidden_layers=62, num_attention_heads=32, num_key_value_heads=16, head_dim=128,
                       query_pre_attn_scalar=168, sliding_window=1024, rope_theta=1e6, rope_local_base_freq=1e4),
}  # fmt: skip
"""What their config.json say, as far as it counts here."""


def main() -> int:
    """Print the table."""
    work = Work(prompts=512)
    print(f"N {work.prompts}, G {work.group}, P {work.prompt}, R {work.response}: {work.predicted:,} response tokens, "
          f"{work.packed:,} packed tokens a step")  # fmt: skip
    columns = "cards ranks ZeRO teachers  step-s prefill decode gather  ref. teacher update exch.  responses/s  longest"
    for pair, (small, large, size, hidden) in PAIRS.items():
        student, teacher = parse_architecture(SHAPES[small]), parse_architecture(SHAPES[large])
        print(f"\n{pair}\n{columns}")
        for cards in (1, 8, 32, 128, 512, 1000):
            timed = [
                (step_seconds(student, teacher, work, layout, H100, hidden=hidden), layout)
                for layout in layouts(student, work, cards, size, H100)
            ]
            if not timed:
                print(f"{cards:5}  does not fit")
                continue
            parts, best = min(timed, key=lambda pair: whole_step(pair[0]))
            shown = [parts[k] for k in ("prefill", "decode", "weights gathered to sample", "reference")]
            shown += [parts["teacher"] + parts["wire"], parts["update"], parts["exchange"]]
            total = whole_step(parts)
            print(f"{cards:5} {best.ranks:5} {best.zero:4} {best.teachers:4} x {size} {total:7.2f} "
                  + " ".join(f"{v:6.2f}" for v in shown)
                  + f" {work.responses / total:9.0f}  {bottleneck(parts)}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
