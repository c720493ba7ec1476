"""Rows for new pieces in a model's two embedding tables, such that it writes and reads them before any training.

A new piece n stands for the old pieces p_1 ... p_k. The mean of their rows alone is not enough:

- Read: the input row is the mean of the old rows in which each piece counts twice as much as the one before it. What
  follows depends on the last piece most, and a plain mean hides which of them came last.
- Written: n is written where p_1 was, so its output row is p_1's, lowered by -log share(n | p_1): the share, counted
  in the corpus, of p_1's places that are n's now. p_1 keeps what is left. The output layer has no bias to put such a
  number in; it goes along the direction u with u'h = 1 in the least squares over the model's own last hidden states h.

A mean in the output layer instead gives each new piece a logit of its own beside p_1's, and the probabilities of all
others fall. Models whose two tables are one are given two, because the two rows differ. docs/faroese.md has figures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from training.tools.tokenizer_pieces import Extension, NewPiece

STATES = 20_000
"""Hidden states that the direction u is fitted to, at most."""


def add_rows(
    model: Any, extension: Extension, start: int, old_texts: Sequence[Sequence[int]], new_texts: Sequence[Sequence[int]]
) -> None:
    """Give the model rows for the extension's pieces, in place. The texts are one corpus, cut both ways.

    `start`: the symbol that stands before a text.
    """
    direction_D = constant_direction(model, [[start, *text] for text in old_texts])
    _untie(model)
    size = max(model.get_input_embeddings().weight.shape[0], extension.first_id + len(extension.pieces))
    model.resize_token_embeddings(size, mean_resizing=False)
    counts = Counter(i for text in new_texts for i in text)
    new = {extension.first_id + i: piece for i, piece in enumerate(extension.pieces)}
    share, left = shares(new, counts)
    read_VD, write = model.get_input_embeddings().weight.data, model.get_output_embeddings()
    written = {
        i: write.weight.data[piece.parts[0]] + math.log(share[i]) * direction_D.to(write.weight.dtype)
        for i, piece in new.items()
    }
    for i, piece in new.items():
        weights = torch.tensor([2.0**place for place in range(len(piece.parts))])
        rows = read_VD[list(piece.parts)].float()
        read_VD[i] = ((weights / weights.sum()) @ rows).to(read_VD.dtype)
        write.weight.data[i] = written[i]
        if getattr(write, "bias", None) is not None:
            write.bias.data[i] = write.bias.data[piece.parts[0]]
    for i, rest in left.items():
        write.weight.data[i] += math.log(rest) * direction_D.to(write.weight.dtype)


def shares(new: dict[int, NewPiece], counts: Counter[int]) -> tuple[dict[int, float], dict[int, float]]:
    """(share of its first piece's places that each new piece takes, what is left to each first piece), half a count
    added to everyone so that none is 0."""
    places = Counter({first: counts[first] for first in {piece.parts[0] for piece in new.values()}})
    members = Counter(piece.parts[0] for piece in new.values())
    for i, piece in new.items():
        places[piece.parts[0]] += counts[i]
    total = {first: n + 0.5 * (members[first] + 1) for first, n in places.items()}
    share = {i: (counts[i] + 0.5) / total[piece.parts[0]] for i, piece in new.items()}
    return share, {first: (counts[first] + 0.5) / n for first, n in total.items()}


@torch.no_grad()
def constant_direction(model: Any, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """float32 [D] u that minimises the sum of (u'h - 1)^2 over the model's last hidden states h."""
    width = model.get_output_embeddings().weight.shape[1]
    second_DD, first_D, seen = torch.zeros(width, width).double(), torch.zeros(width).double(), 0
    for text in texts:
        states_TD = model.base_model(torch.tensor([list(text)], device=model.device), use_cache=False)
        states_TD = states_TD.last_hidden_state[0].double().cpu()
        second_DD += states_TD.T @ states_TD
        first_D += states_TD.sum(0)
        seen += len(states_TD)
        if seen >= STATES:
            break
    # A thousandth of the mean variance keeps the solution tame where there are fewer states than dimensions.
    ridge = 1e-3 * second_DD.diagonal().mean() * torch.eye(width).double()
    return torch.linalg.solve(second_DD + ridge, first_D).float().to(model.device)


def _untie(model: Any) -> None:
    """An output layer of its own, equal to the input's."""
    read, write = model.get_input_embeddings().weight, model.get_output_embeddings()
    if write.weight.data_ptr() != read.data_ptr():
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    own = nn.Linear(read.shape[1], read.shape[0], bias=False, dtype=read.dtype, device=read.device)
    own.weight.data.copy_(read.data)
    model.set_output_embeddings(own)


@torch.no_grad()
def bits_per_byte(model: Any, start: int, texts: Sequence[Sequence[int]], size: int, longest: int = 512) -> float:
    """Bits that the model needs for a byte of the texts (`size` bytes in all), each behind the symbol `start`.

    A text of more than `longest` tokens is cut into pieces of so many, each behind a start of its own.
    """
    pieces = sorted(
        ([start, *text[i : i + longest]] for text in texts for i in range(0, len(text), longest)), key=len
    )  # fmt: skip
    nats = 0.0
    for begin in range(0, len(pieces), 16):
        batch = pieces[begin : begin + 16]
        ids = torch.zeros(len(batch), len(batch[-1]), dtype=torch.int64)
        lengths = torch.tensor([len(piece) for piece in batch])
        for row, piece in enumerate(batch):
            ids[row, : len(piece)] = torch.tensor(piece)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        logits = model(ids.to(model.device), attention_mask=mask.long().to(model.device), use_cache=False).logits
        logprobs = logits[:, :-1].float().log_softmax(-1).cpu().gather(-1, ids[:, 1:, None])[..., 0]
        nats -= float(logprobs[mask[:, 1:]].double().sum())
    return nats / math.log(2) / size
