"""Sampling from the student: each prompt is prefilled once, its G responses decode against that one cache.

Random numbers belong to (seed, step, prompt): which rank samples a prompt, and beside which others, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from configs.schema import SamplingConfig
from rewards.tokens import from_grid
from training.student.decoders import Decoder, make_decoder
from training.student.few_rows import few_rows
from training.student.policy import Policy


@dataclass(frozen=True)
class Samples:
    """Responses of N prompts, B = N*G, ordered by prompt."""

    responses_B: tuple[tuple[int, ...], ...]
    """Token ids, the end symbol included where one was drawn."""
    finished_B: torch.Tensor
    """bool an end symbol was drawn."""
    full_logprobs_S: torch.Tensor
    """float32 nats under the full softmax at the temperature."""
    drawn_logprobs_S: torch.Tensor
    """float32 nats under the distribution that was drawn from, where that is a mixture with another."""


BLOCK = 512
"""Entries of the vocabulary that `draw` adds up before it looks at one by one."""


def draw(logprobs_AV: torch.Tensor, uniform_A: torch.Tensor) -> torch.Tensor:
    """Token ids [A] by inverting the cumulative distribution at `uniform_A` in [0, 1).

    First of blocks of the vocabulary, then of the entries of one block: the whole cumulative sum in float64 costs as
    much as several layers of a small model.
    """
    blocks_ANb = F.pad(logprobs_AV.exp(), (0, -logprobs_AV.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    cumulative = blocks_ANb.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = uniform_A.double()[:, None] * cumulative[:, -1:]
    block = _first_beyond(cumulative, wanted)
    before = F.pad(cumulative, (1, 0)).gather(1, block)
    chosen_Ab = blocks_ANb.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    return (block * BLOCK + _first_beyond(chosen_Ab, wanted - before))[:, 0]


def _first_beyond(cumulative: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Index [A, 1] of the first entry above `wanted`, and never past the last that has any mass: rounding must not."""
    total = cumulative[:, -1:].contiguous()
    return torch.minimum(torch.searchsorted(cumulative, wanted, right=True), torch.searchsorted(cumulative, total))


Mixture = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From step t, the active responses [A], the token that each chose last (nothing at t = 0) and the policy's
log-probabilities [A, V] to those that are drawn from, [A, V]."""


@dataclass(frozen=True)
class Drawing:
    """What a round of sampling takes besides its settings."""

    end_tokens: Sequence[int]
    """A response ends with the first of these."""
    generators: Sequence[torch.Generator] | None
    """Random numbers of each prompt. None: greedy decoding."""
    any_rank: Callable[[bool], bool] = bool
    """Whether any rank has an active response. Under ZeRO 3 every forward pass is a collective, so that all ranks go on
    until none has."""
    on_step: Callable[[int], None] = lambda _: None
    """Called after each decoding step t."""
    mixture: Mixture | None = None
    """Another distribution in place of the policy's."""


@torch.no_grad()
def sample(policy: Policy, prompts: Sequence[tuple[int, ...]], config: SamplingConfig, drawing: Drawing) -> Samples:
    """Sample `config.group_size` responses to each prompt."""
    with few_rows(policy.model, len(prompts) * config.group_size):
        decoder = make_decoder(policy, prompts, config.group_size, config.max_new_tokens)
        return _decode(decoder, config, drawing)


def _decode(decoder: Decoder, config: SamplingConfig, drawing: Drawing) -> Samples:
    """Token by token; a finished response leaves the batch."""
    logits, longest = decoder.first_BV, config.max_new_tokens
    batch, device = len(logits), logits.device  # the model's work is done there, the bookkeeping on the CPU
    uniform_BR = None
    if drawing.generators is not None:
        numbers = [torch.rand(config.group_size, longest, generator=g, dtype=torch.float64) for g in drawing.generators]
        uniform_BR = torch.cat(numbers)
    ends = torch.tensor(sorted(drawing.end_tokens), dtype=torch.int64)
    tokens = torch.zeros(batch, longest, dtype=torch.int64)
    full, drawn_from = torch.zeros(batch, longest), torch.zeros(batch, longest)
    lengths = torch.zeros(batch, dtype=torch.int64)
    finished = torch.zeros(batch, dtype=torch.bool)
    active = torch.arange(batch)
    for t in range(longest):
        if len(active):
            scaled = logits.float() if config.temperature == 1.0 else logits.float() / config.temperature
            logprobs = scaled.log_softmax(-1)
            if uniform_BR is None:
                source, chosen = logprobs, logprobs.argmax(-1)
            else:
                mixture = drawing.mixture
                source = logprobs if mixture is None else mixture(t, active, tokens[active, t - 1], logprobs)
                chosen = draw(source, uniform_BR[active, t].to(device))
            full[active, t] = logprobs.gather(-1, chosen[:, None])[:, 0].cpu()
            drawn_from[active, t] = source.gather(-1, chosen[:, None])[:, 0].cpu()
            tokens[active, t] = chosen = chosen.cpu()
            lengths[active] += 1
            ended = torch.isin(chosen, ends)
            finished[active[ended]] = True
            active = active[~ended]
        drawing.on_step(t)
        if t + 1 == longest or not drawing.any_rank(len(active) > 0):
            break
        # A rank that has finished keeps step with the others on one dummy response; nothing of it is kept.
        rows = active if len(active) else torch.zeros(1, dtype=torch.int64)
        logits = decoder.advance(rows, tokens[rows, t])
    return Samples(
        responses_B=tuple(tuple(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)),
        finished_B=finished,
        full_logprobs_S=from_grid(full, lengths),
        drawn_logprobs_S=from_grid(drawn_from, lengths),
    )
