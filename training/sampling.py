"""Sampling from the student: each prompt is prefilled once, its G responses decode against that one cache.

Random numbers belong to (seed, step, prompt): which rank samples a prompt, and beside which others, changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from configs.schema import SamplingConfig
from training.data import random_stream
from training.decoders import Decoder, make_decoder
from training.few_rows import few_rows
from training.policy import Policy


@dataclass(frozen=True)
class Samples:
    """Responses of N prompts, B = N*G, ordered by prompt."""

    responses: tuple[tuple[int, ...], ...]
    """B lists of token ids, the end symbol included where one was drawn."""
    finished_B: torch.Tensor
    """bool [B] an end symbol was drawn."""
    full_logprobs_BR: torch.Tensor
    """float32 [B, R] under the full softmax at the temperature; 0 on padding."""
    drawn_logprobs_BR: torch.Tensor
    """float32 [B, R] under the truncated distribution that was drawn from; 0 on padding."""


def prompt_generator(seed: int, step: int, prompt: int) -> torch.Generator:
    """Random numbers of one prompt in one step."""
    return random_stream(seed, step, prompt)


def truncate(logprobs_AV: torch.Tensor, *, top_k: int, top_p: float, min_p: float = 0.0) -> torch.Tensor:
    """Keep the k likeliest tokens; of them the smallest set with mass >= top_p; of it those at least min_p times as
    likely as the likeliest (min-p, arXiv 2407.01082, section 3). Returns renormalised log-probabilities."""
    if 0 < top_k < logprobs_AV.shape[-1]:
        kth = logprobs_AV.topk(top_k, -1).values[:, -1:]
        logprobs_AV = logprobs_AV.masked_fill(logprobs_AV < kth, -torch.inf).log_softmax(-1)
    if top_p < 1.0:
        ordered, index = logprobs_AV.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= top_p)
        logprobs_AV = logprobs_AV.masked_fill(drop, -torch.inf).log_softmax(-1)
    if min_p > 0.0:
        least = logprobs_AV.amax(-1, keepdim=True) + math.log(min_p)
        logprobs_AV = logprobs_AV.masked_fill(logprobs_AV < least, -torch.inf).log_softmax(-1)
    return logprobs_AV


def draw(logprobs_AV: torch.Tensor, uniform_A: torch.Tensor) -> torch.Tensor:
    """Token ids [A] by inverting the cumulative distribution at `uniform_A` in [0, 1)."""
    cumulative = logprobs_AV.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    drawn = torch.searchsorted(cumulative, uniform_A.double()[:, None] * total, right=True)
    # Rounding at the top end must not reach past the last token that has any mass: the first to reach the total.
    return torch.minimum(drawn, torch.searchsorted(cumulative, total)).squeeze(1)


Mixture = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From step t, the active responses [A], the token that each chose last (nothing at t = 0) and the policy's
log-probabilities [A, V] to those that are drawn from, [A, V]."""


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[tuple[int, ...]],
    config: SamplingConfig,
    *,
    end_tokens: Sequence[int],
    generators: Sequence[torch.Generator] | None,
    any_rank: Callable[[bool], bool] | None = None,
    on_step: Callable[[int], None] | None = None,
    mixture: Mixture | None = None,
) -> Samples:
    """Sample `config.group_size` responses to each prompt.

    `generators`: one a prompt, or None for greedy decoding. `any_rank(active)`: under ZeRO 3 every forward pass is a
    collective, so all ranks go on until none is active; it returns whether any is. `on_step(t)` is called after each
    decoding step. `mixture` puts another distribution in place of the policy's.
    """
    group, longest = config.group_size, config.max_new_tokens
    batch = len(prompts) * group
    with few_rows(policy.model, batch):
        decoder = make_decoder(policy, prompts, group, longest)
        return _decode(decoder, config, batch, end_tokens, generators, any_rank, on_step, mixture)


def _decode(
    decoder: Decoder, config: SamplingConfig, batch: int, end_tokens: Sequence[int],
    generators: Sequence[torch.Generator] | None, any_rank: Callable[[bool], bool] | None,
    on_step: Callable[[int], None] | None, mixture: Mixture | None,
) -> Samples:  # fmt: skip
    """Token by token; a finished response leaves the batch."""
    group, longest, logits = config.group_size, config.max_new_tokens, decoder.first_BV
    device = logits.device  # the model's work is done there, the bookkeeping on the CPU
    uniform_BR = (
        torch.cat([torch.rand(group, longest, generator=g, dtype=torch.float64) for g in generators])
        if generators is not None
        else None
    )
    ends = torch.tensor(sorted(end_tokens), dtype=torch.int64)
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
                kept, chosen = logprobs, logprobs.argmax(-1)
            else:
                source = logprobs if mixture is None else mixture(t, active, tokens[active, t - 1], logprobs)
                kept = truncate(source, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
                chosen = draw(kept, uniform_BR[active, t].to(device))
            full[active, t] = logprobs.gather(-1, chosen[:, None])[:, 0].cpu()
            drawn_from[active, t] = kept.gather(-1, chosen[:, None])[:, 0].cpu()
            tokens[active, t] = chosen = chosen.cpu()
            lengths[active] += 1
            ended = torch.isin(chosen, ends)
            finished[active[ended]] = True
            active = active[~ended]
        if on_step is not None:
            on_step(t)
        if t + 1 == longest or not (any_rank(len(active) > 0) if any_rank else len(active) > 0):
            break
        # A rank that has finished keeps step with the others on one dummy response; nothing of it is kept.
        rows = active if len(active) else torch.zeros(1, dtype=torch.int64)
        logits = decoder.advance(rows, tokens[rows, t])
    used = int(lengths.max()) if batch else 0
    responses = tuple(tuple(tokens[b, : int(lengths[b])].tolist()) for b in range(batch))
    return Samples(responses, finished, full[:, :used], drawn_from[:, :used])
