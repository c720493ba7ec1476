"""Sampling from the student: each prompt is prefilled once, its G responses decode against that one cache.

Random numbers belong to (seed, step, prompt): which rank samples a prompt, and beside which others, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from configs.schema import SamplingConfig
from inference.attention.decode import DecodePlan
from inference.attention.packed import PrefillPlan, PromptCache
from inference.attention.packing import Group, pack_row
from inference.attention.static_decode import StaticDecodePlan
from rewards.tokens import from_grid
from training.experience import Samples
from training.student.few_rows import few_rows
from training.student.graph_decoder import StaticDecoder
from training.student.plain_decoders import PlainDecoder, UncachedDecoder
from training.student.policy import Policy, Way

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
        if stays_on_device(policy, drawing):
            return _decode_on_device(policy, prompts, config, drawing)
        decoder = make_decoder(policy, prompts, config.group_size, config.max_new_tokens)
        return _decode(decoder, config, drawing)


def stays_on_device(policy: Policy, drawing: Drawing) -> bool:
    """Whether the host leaves the steps to the device: on CUDA, in packed rows, where no other distribution and no
    other rank has a say in each of them, and a graph has not failed yet."""
    alone = drawing.mixture is None and drawing.any_rank is bool
    return next(policy.parameters()).device.type == "cuda" and policy.way is Way.PACKED and alone and policy.capturable


def _decode(decoder: Decoder, config: SamplingConfig, drawing: Drawing) -> Samples:
    """Token by token; a finished response leaves the batch."""
    logits, longest = decoder.first_BV, config.max_new_tokens
    batch, device = len(logits), logits.device  # the model's work is done there, the bookkeeping on the CPU
    uniform_BR = _uniform(config, drawing)
    ends = torch.tensor(sorted(drawing.end_tokens), dtype=torch.int64)
    tokens = torch.zeros(batch, longest, dtype=torch.int64)
    full, drawn_from = torch.zeros(batch, longest), torch.zeros(batch, longest)
    active = rows = torch.arange(batch)
    for t in range(longest):
        if len(active):
            logprobs = _at_temperature(logits, config.temperature)
            if uniform_BR is None:
                source, chosen = logprobs, logprobs.argmax(-1)
            else:
                mixture = drawing.mixture
                source = logprobs if mixture is None else mixture(t, active, tokens[active, t - 1], logprobs)
                chosen = draw(source, uniform_BR[active, t].to(device))
            full[active, t] = logprobs.gather(-1, chosen[:, None])[:, 0].cpu()
            drawn_from[active, t] = source.gather(-1, chosen[:, None])[:, 0].cpu()
            tokens[active, t] = chosen = chosen.cpu()
            active = active[~torch.isin(chosen, ends)]
        drawing.on_step(t)
        if t + 1 == longest or not drawing.any_rank(len(active) > 0):
            break
        # A rank that has finished keeps step with the others on the response that ended last; nothing of it is kept.
        rows = active if len(active) else rows[:1]
        logits = decoder.advance(rows, tokens[rows, t])
    return _up_to_the_end(tokens, ends, full, drawn_from)


LOOK = 16
"""Tokens between two looks at which responses have ended, where tokens stay on the device: a look waits for it."""


def _decode_on_device(
    policy: Policy, prompts: Sequence[tuple[int, ...]], config: SamplingConfig, drawing: Drawing
) -> Samples:
    """The same tokens; a finished response stays in the batch, and what it goes on to say is cut off."""
    device, longest = next(policy.parameters()).device, config.max_new_tokens
    uniform_BR = _uniform(config, drawing)
    uniform_BR = None if uniform_BR is None else uniform_BR.to(device)
    ends = torch.tensor(sorted(drawing.end_tokens), dtype=torch.int64)
    tokens_BR = torch.zeros(len(prompts) * config.group_size, longest, dtype=torch.int64, device=device)
    logprobs_BR = torch.zeros(tokens_BR.shape, device=device)

    def choose(logits_BV: torch.Tensor, t_1: torch.Tensor) -> torch.Tensor:
        logprobs = _at_temperature(logits_BV, config.temperature)
        chosen = logprobs.argmax(-1) if uniform_BR is None else draw(logprobs, uniform_BR.index_select(1, t_1)[:, 0])
        tokens_BR.index_copy_(1, t_1, chosen[:, None])
        logprobs_BR.index_copy_(1, t_1, logprobs.gather(-1, chosen[:, None]))
        return chosen

    cache, first_BV = prefilled(policy, prompts, config.group_size)
    decoder = StaticDecoder(policy, StaticDecodePlan(cache, config.group_size, longest), first_BV, choose)
    drawing.on_step(0)
    for t in range(1, longest):
        if t % LOOK == 0 and bool(torch.isin(tokens_BR[:, :t].cpu(), ends).any(1).all()):
            break
        decoder.advance()
        drawing.on_step(t)
    logprobs = logprobs_BR.cpu()
    return _up_to_the_end(tokens_BR.cpu(), ends, logprobs, logprobs)


def _uniform(config: SamplingConfig, drawing: Drawing) -> torch.Tensor | None:
    """float64 [B, R] the random number of each token; None: greedy."""
    if drawing.generators is None:
        return None
    shape = (config.group_size, config.max_new_tokens)
    return torch.cat([torch.rand(shape, generator=g, dtype=torch.float64) for g in drawing.generators])


def _at_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """float32 log-probabilities [A, V]."""
    return (logits.float() if temperature == 1.0 else logits.float() / temperature).log_softmax(-1)


def _up_to_the_end(tokens: torch.Tensor, ends: torch.Tensor, full: torch.Tensor, drawn_from: torch.Tensor) -> Samples:
    """Of grids [B, R]: each response to its first end symbol; one without is as long as the grid."""
    is_end = torch.isin(tokens, ends)
    finished = is_end.any(1)
    lengths = torch.where(finished, is_end.int().argmax(1) + 1, tokens.shape[1])
    return Samples(
        responses_B=tuple(tuple(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)),
        finished_B=finished,
        behavior_logprobs_S=from_grid(full, lengths),
        sampled_logprobs_S=from_grid(drawn_from, lengths),
    )


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


class Decoder(Protocol):
    """N prompts with G responses each, one token at a time; B = N*G."""

    first_BV: torch.Tensor
    """[B, V] logits of each response's first token, in the model's type."""

    def advance(self, rows_A: torch.Tensor, tokens_A: torch.Tensor) -> torch.Tensor:
        """[A, V] logits after `tokens_A` (int64) were chosen for the responses `rows_A` (int64, ascending).

        A response that is left out is finished and does not come back.
        """


def make_decoder(policy: Policy, prompts: Sequence[tuple[int, ...]], group_size: int, longest: int) -> Decoder:
    """The decoder that the model can take."""
    if policy.way is Way.PACKED:
        return GroupedDecoder(policy, prompts, group_size, longest)
    return (PlainDecoder if policy.way is Way.PLAIN else UncachedDecoder)(policy, prompts, group_size)


def prefilled(policy: Policy, prompts: Sequence[tuple[int, ...]], group_size: int) -> tuple[PromptCache, torch.Tensor]:
    """Keys and values of the prompts, and the logits [B, V] of each response's first token."""
    row = pack_row([Group(prompt=tuple(p), responses=()) for p in prompts]).to(next(policy.parameters()).device)
    prefill = PrefillPlan(row)
    hidden = policy.hidden(row.tokens_T, row.positions_T, prefill)
    last = torch.cumsum(prefill.cache.lengths_N, 0) - 1
    return prefill.cache, policy.logits(hidden[last]).repeat_interleave(group_size, 0)


class GroupedDecoder:
    """Each prompt is prefilled once; its responses decode against that one cache, each with a suffix of its own."""

    def __init__(self, policy: Policy, prompts: Sequence[tuple[int, ...]], group_size: int, longest: int) -> None:
        self._policy = policy
        self._device = next(policy.parameters()).device
        cache, self.first_BV = prefilled(policy, prompts, group_size)
        self._plan = DecodePlan(cache, group_size, longest)

    def advance(self, rows_A: torch.Tensor, tokens_A: torch.Tensor) -> torch.Tensor:
        positions_A = self._plan.advance(rows_A)
        return self._policy.logits(self._policy.hidden(tokens_A.to(self._device), positions_A, self._plan))
