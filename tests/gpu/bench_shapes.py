"""Model shapes, what their phases compute, and what cards can do. Plain numbers: no model, no device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GROUP = 8
"""G: responses to a prompt."""


@dataclass(frozen=True)
class Shape:
    """A language model's sizes."""

    family: str
    """llama or mistral."""
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False

    @property
    def linear(self) -> int:
        """Weights of the linear layers but for the output layer: each costs 2 FLOPs a token."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def parameters(self) -> int:
        """All of them, but for the norms."""
        return self.linear + self.vocab * self.hidden * (1 if self.tied else 2)

    def settings(self) -> dict[str, Any]:
        """Keywords of transformers' configuration."""
        window = {"sliding_window": None} if self.family == "mistral" else {}
        return {
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "tie_word_embeddings": self.tied, "max_position_embeddings": 4096,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **window,
        }  # fmt: skip


MODELS = {
    "SmolLM2-135M": Shape("llama", 49152, 576, 1536, 30, 9, 3, tied=True),
    "Llama 1.5B": Shape("llama", 32000, 2048, 5632, 28, 16, 8),
    "Mistral 7B": Shape("mistral", 32000, 4096, 14336, 32, 32, 8),
}
TOKENS = {"400/32": (400, 32), "32/128": (32, 128), "512/512": (512, 512)}
"""Prompt and response tokens."""
TINY_MODELS = {
    "tiny Llama": Shape("llama", 160, 32, 48, 2, 4, 2, tied=True),
    "tiny Mistral": Shape("mistral", 160, 32, 48, 2, 4, 2),
}
TINY_TOKENS = {"12/4": (12, 4), "4/8": (4, 8)}


@dataclass(frozen=True)
class Work:
    """What a phase computes and reads."""

    tokens: int
    """That go through the layers."""
    predicted: int
    """That go through the output layer."""
    pairs: int
    """Of query and key that attention looks at, in one head of one layer."""
    factor: int = 1
    """3 with a backward pass: the gradients of inputs and of weights cost a forward pass each."""
    passes: int = 1
    """How often all weights are read: once a forward pass, and for decoding once a token."""
    cached: int = 0
    """Tokens whose keys and values are read, over all passes."""

    def bytes(self, shape: Shape) -> float:
        """Least bytes in bfloat16 that have to come from memory: weights, and cached keys and values."""
        weights = shape.linear + shape.vocab * shape.hidden
        cache = 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads)
        return 2.0 * (self.factor * self.passes * weights + self.cached * cache)

    def flops(self, shape: Shape) -> float:
        """Model FLOPs; nothing that is computed again, and no padding."""
        products = 2 * self.tokens * shape.linear + 2 * self.predicted * shape.hidden * shape.vocab
        return float(self.factor * (products + 4 * self.pairs * shape.hidden * shape.layers))


def triangle(n: int) -> int:
    """Pairs of n tokens of which each sees itself and those before it."""
    return n * (n + 1) // 2


def prefill(prompts: int, prompt: int, *, grouped: bool) -> Work:
    """Each prompt once, or once for each of its responses."""
    rows = prompts if grouped else prompts * GROUP
    return Work(rows * prompt, rows, rows * triangle(prompt))


def decode(prompts: int, prompt: int, response: int) -> Work:
    """Every response's tokens after the first, one by one."""
    rows, steps = prompts * GROUP, response - 1
    pairs = rows * (steps * prompt + triangle(steps))
    cached = steps * prompts * prompt + rows * triangle(steps)  # a prompt's cache is shared by its responses
    return Work(rows * steps, rows * steps, pairs, passes=steps, cached=cached)


def forward(prompts: int, prompt: int, response: int, *, grouped: bool) -> Work:
    """One pass over whole responses: the last token of a response is predicted, not read."""
    rows, read = prompts * GROUP, response - 1
    if grouped:
        pairs = prompts * triangle(prompt) + rows * (read * prompt + triangle(read))
        return Work(prompts * prompt + rows * read, rows * response, pairs)
    return Work(rows * (prompt + read), rows * response, rows * triangle(prompt + read))


PEAKS = (
    ("H200", 989e12, "NVIDIA H200 data sheet"),
    ("H100 80GB HBM3", 989e12, "NVIDIA H100 data sheet, SXM"),
    ("A100", 312e12, "NVIDIA A100 data sheet"),
    ("L40S", 362e12, "NVIDIA L40S data sheet"),
)
"""Part of the device's name, bfloat16 FLOP/s of dense products, source. Data sheets give twice as much with sparsity
for H100, H200 and L40S."""


def known_peak(name: str) -> tuple[float, str] | None:
    """FLOP/s and source of a card in the table."""
    return next(((flops, source) for part, flops, source in PEAKS if part in name), None)


def inference_bytes(shape: Shape, prompts: int, prompt: int, response: int) -> float:
    """Estimate: weights, keys and values of prompts and responses, 4 GB for what lives for a moment."""
    held = prompts * prompt + prompts * GROUP * response
    cache = 4 * held * shape.layers * shape.kv_heads * (shape.hidden // shape.heads)
    plain = GROUP * cache  # plain rows repeat the prompt
    return 2 * shape.parameters + max(cache, plain if response < 512 else 0) + 4e9


def update_bytes(shape: Shape, row_tokens: int) -> float:
    """Estimate: weights and gradients in bfloat16, master weights, gradients and two moments in float32 (20 bytes a
    parameter), activations of a packed row (34 bytes a token, layer and hidden unit; Korthikanti et al. 2022, arXiv
    2205.05198, eq. 2, without its attention scores), 4 GB for logits and the rest."""
    return 20 * shape.parameters + 34.0 * row_tokens * shape.hidden * shape.layers + 4e9
