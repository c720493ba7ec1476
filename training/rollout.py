"""Who samples: our grouped sampler behind DeepSpeed's `RolloutEngine` interface, or another engine behind the same.

`actor.rollout: grouped` samples with training/sampling.py. `deepspeed` puts DeepSpeed's own engine in its place: the
hybrid engine's injected kernels where they exist (CUDA, few model families), transformers' `generate` elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch

from configs import schema
from training.data import random_stream
from training.deepspeed_engine import (
    Engine,
    HybridEngineRollout,
    RolloutBatch,
    RolloutEngine,
    RolloutRequest,
    RolloutSampling,
)
from training.policy import Policy
from training.sampling import sample


class GroupedRollout(RolloutEngine):
    """Our sampler for whoever speaks DeepSpeed's interface: prompts are prefilled once, responses share the cache."""

    name = "grouped"

    def __init__(
        self, policy: Policy, end_tokens: Sequence[int], *, pad_token: int, seed: int = 0,
        any_rank: Callable[[bool], bool] | None = None,
    ) -> None:  # fmt: skip
        self._policy = policy
        self._end_tokens = tuple(end_tokens)
        self._pad = pad_token
        self._seed = seed
        self._any_rank = any_rank
        self._calls = 0

    def generate(self, request: RolloutRequest, sampling: RolloutSampling) -> RolloutBatch:
        """Left-padded prompts in, prompts with responses out. Temperature 0 is greedy. Each call draws anew."""
        prompts = [
            tuple(ids[mask > 0].tolist())
            for ids, mask in zip(request.prompt_ids, request.prompt_attention_mask, strict=True)
        ]
        greedy = sampling.temperature <= 0
        config = schema.SamplingConfig(
            group_size=sampling.n_samples_per_prompt, max_new_tokens=sampling.max_new_tokens,
            temperature=1.0 if greedy else sampling.temperature, top_k=max(sampling.top_k, 0), top_p=sampling.top_p,
        )  # fmt: skip
        streams = None if greedy else [random_stream(self._seed, self._calls, n) for n in range(len(prompts))]
        self._calls += 1
        samples = sample(
            self._policy, prompts, config, end_tokens=self._end_tokens, generators=streams, any_rank=self._any_rank
        )
        return self._batch(request, samples.responses, config.group_size)

    def _batch(self, request: RolloutRequest, responses: Sequence[tuple[int, ...]], group: int) -> RolloutBatch:
        prompt_ids = request.prompt_ids.repeat_interleave(group, 0)
        width = max((len(r) for r in responses), default=0)
        padded = torch.tensor([[*r, *[self._pad] * (width - len(r))] for r in responses], dtype=torch.int64)
        # Masks come from lengths: the pad id may be an end symbol that was really drawn.
        lengths = torch.tensor([len(r) for r in responses])
        real = (torch.arange(width)[None, :] < lengths[:, None]).long()
        mask = request.prompt_attention_mask.repeat_interleave(group, 0)
        device = prompt_ids.device
        return RolloutBatch(
            input_ids=torch.cat([prompt_ids, padded.to(device)], 1),
            attention_mask=torch.cat([mask, real.to(mask)], 1),
            response_start_idx=torch.full((len(responses),), prompt_ids.shape[1], dtype=torch.long, device=device),
        )

    def sync_weights(self, step: int) -> None:
        """Nothing to do: it samples from the weights that are trained."""


class DeepSpeedRollout(RolloutEngine):
    """DeepSpeed's own engine over ours, with its injected kernels switched in while it samples."""

    name = "deepspeed"

    def __init__(self, engine: Engine, end_tokens: Sequence[int], pad_token: int) -> None:
        self._engine = engine
        # All that it asks of a tokenizer. Of several end symbols it knows one; `responses_of` cuts at the others.
        ids = SimpleNamespace(eos_token_id=end_tokens[0], pad_token_id=pad_token)
        self._inner = HybridEngineRollout(engine.engine, ids)

    def generate(self, request: RolloutRequest, sampling: RolloutSampling) -> RolloutBatch:
        """See DeepSpeed."""
        try:
            with contextlib.redirect_stdout(None):  # it prints its latencies
                self._engine.engine.eval()  # the hybrid engine puts its inference layers in place
            return self._inner.generate(request, sampling)
        finally:
            self._engine.engine.train()  # and back
            self._engine.module.eval()

    def sync_weights(self, step: int) -> None:
        """Nothing to do: it shares the weights."""


def responses_of(
    engine: RolloutEngine, prompts: Sequence[tuple[int, ...]], sampling: schema.SamplingConfig, *,
    end_tokens: Sequence[int], pad_token: int, device: torch.device, greedy: bool,
) -> list[tuple[int, ...]]:  # fmt: skip
    """Ask any engine for G responses to each prompt; each ends with its first end symbol."""
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_token] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    asked = RolloutSampling(
        max_new_tokens=sampling.max_new_tokens, temperature=0.0 if greedy else sampling.temperature,
        top_p=sampling.top_p, top_k=sampling.top_k, n_samples_per_prompt=sampling.group_size,
    )  # fmt: skip
    batch = engine.generate(RolloutRequest(ids, mask), asked)
    ends, out = set(end_tokens), []
    for row, start in zip(batch.input_ids.tolist(), batch.response_start_idx.tolist(), strict=True):
        response = row[start : start + sampling.max_new_tokens]
        first = next((i for i, token in enumerate(response) if token in ends), len(response) - 1)
        out.append(tuple(response[: first + 1]))
    return out
