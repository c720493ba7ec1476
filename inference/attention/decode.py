"""The plan for decoding: one query of each response, against the one cache of its prompt and a suffix of its own."""

from __future__ import annotations

import torch

from inference.attention.grouped import ScoreRule
from inference.attention.packed import PromptCache


class DecodePlan:
    """One query of each active response against its prompt's cache and its own preallocated suffix.

    The prompt's cache is never expanded. All responses of a batch are at the same step t; finished ones leave the row
    (`rows_A`), so only attention, and no matrix product of the model, still sees their slots. Where half of the groups
    have finished, attention leaves them too.
    """

    def __init__(self, prompts: PromptCache, group_size: int, max_new_tokens: int) -> None:
        self._prompts = prompts
        self._group = group_size
        self._held_N = torch.arange(len(prompts.lengths), device="cpu")
        """Numbers of the groups whose caches are here, on the host."""
        self.max_new_tokens = max_new_tokens
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._rows_A = torch.empty(0, dtype=torch.int64)
        self._everybody = False
        self._hidden: dict[int | None, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self._step = -1
        self._read = 0
        """Own slots that a query reads."""

    def advance(self, rows_A: torch.Tensor) -> torch.Tensor:
        """Start the next step with the active responses `rows_A` (int64 [A] on the host, ascending, indices in
        [0, N*G), each of which was active before).

        Returns their positions, int64 [A], where the cache is.
        """
        self._step += 1
        if self._step >= self.max_new_tokens:
            raise ValueError(f"step {self._step} is past the {self.max_new_tokens} preallocated slots")
        self._read = self._step + 1
        # What the full view hides (padding) does not change from step to step; a window moves.
        self._hidden = {w: hidden for w, hidden in self._hidden.items() if w is None}
        active = torch.unique(rows_A // self._group)
        if 2 * len(active) <= len(self._held_N):
            self._keep_only(active)
        place_A = torch.searchsorted(self._held_N, rows_A // self._group)
        self._rows_A = (place_A * self._group + rows_A % self._group).to(self._prompts.lengths_N.device)
        self._everybody = len(rows_A) == len(self._held_N) * self._group
        return self._prompts.lengths_N[self._rows_A // self._group] + self._step

    def _keep_only(self, groups_N: torch.Tensor) -> None:
        """Let go of the caches of all other groups, and of the padding that only their prompts needed."""
        places = torch.searchsorted(self._held_N, groups_N)
        self._held_N, self._hidden = groups_N, {}
        lengths = tuple(self._prompts.lengths[place] for place in places.tolist())
        places = places.to(self._prompts.lengths_N.device)
        held = self._prompts
        for caches in (held.keys, held.values, self._keys, self._values):
            for layer, cache in caches.items():  # one at a time, so that never two whole caches are alive
                caches[layer] = cache.index_select(0, places)
        keys, values = ({n: c[:, :, : max(lengths)] for n, c in caches.items()} for caches in (held.keys, held.values))
        self._prompts = PromptCache(lengths, held.lengths_N[places], keys=keys, values=values)

    def attend(
        self, layer: int, query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, rule: ScoreRule
    ) -> torch.Tensor:
        """See `AttentionPlan.attend`; T = A active responses, one query each."""
        prompt_key, prompt_value = self._prompts.keys[layer], self._prompts.values[layer]
        N, K, P, D = prompt_key.shape
        G, per_kv = self._group, query_THD.shape[1] // K
        if layer not in self._keys:
            self._keys[layer] = prompt_key.new_zeros(N, K, G, self.max_new_tokens, D)
            self._values[layer] = prompt_key.new_zeros(N, K, G, self.max_new_tokens, D)
        keys, values = self._keys[layer], self._values[layer]
        # [A, ...] in the order of the batch; slots of finished responses hold zeros that nobody reads.
        query_BHD, key_BKD, value_BKD = (self._all_slots(t) for t in (query_THD, key_TKD, value_TKD))
        self._write(keys, key_BKD.view(N, G, K, D).transpose(1, 2))
        self._write(values, value_BKD.view(N, G, K, D).transpose(1, 2))

        query = query_BHD.mul(rule.scale).view(N, G, K, per_kv, D).transpose(1, 2).contiguous()
        scores = torch.cat(
            [
                (query.view(N * K, G * per_kv, D) @ prompt_key.flatten(0, 1).transpose(1, 2)).view(-1, per_kv, P),
                query.view(-1, per_kv, D) @ keys.view(-1, self.max_new_tokens, D)[:, : self._read].transpose(1, 2),
            ],
            -1,
        )
        if rule.softcap is not None:
            scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
        if rule.window not in self._hidden:
            self._hidden[rule.window] = self._blocked(rule.window)
        of_prompt, own = self._hidden[rule.window]
        if of_prompt is not None:
            scores.view(N, K * G * per_kv, -1)[..., :P].masked_fill_(of_prompt[:, None], -torch.inf)
        if own is not None:
            scores[..., P:].masked_fill_(own, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        from_prompt = weights.view(N * K, G * per_kv, -1)[..., :P] @ prompt_value.flatten(0, 1)
        suffix_value = values.view(-1, self.max_new_tokens, D)[:, : self._read]
        out = torch.baddbmm(from_prompt.view(-1, per_kv, D), weights[..., P:], suffix_value)
        out_BHD = out.view(N, K, G, per_kv, D).transpose(1, 2).reshape(N * G, K * per_kv, D)
        return out_BHD if self._everybody else out_BHD[self._rows_A]

    def _all_slots(self, active: torch.Tensor) -> torch.Tensor:
        """[A, ...] of the active responses as [B, ...]."""
        if self._everybody:
            return active
        slots = active.new_zeros(len(self._prompts.lengths_N) * self._group, *active.shape[1:])
        slots[self._rows_A] = active
        return slots

    def _write(self, cache_NKGRD: torch.Tensor, new_NKGD: torch.Tensor) -> None:
        """Put this step's keys or values into their slots."""
        cache_NKGRD[:, :, :, self._step] = new_NKGD

    def _blocked(self, window: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """bool [N, P], true where a prompt slot is padding or has left the window; bool [slots read], the same of
        their own. None: nowhere. Once a step."""
        longest, own = max(self._prompts.lengths), None
        if window is not None and self._step >= window:
            own = torch.arange(self._read, device=self._prompts.lengths_N.device) <= self._step - window
        padded = min(self._prompts.lengths) < longest
        if not padded and (window is None or longest + self._step < window):
            return None, own
        return self._hidden_prompt(window, self._step), own

    def _hidden_prompt(self, window: int | None, step: int | torch.Tensor) -> torch.Tensor:
        lengths = self._prompts.lengths_N[:, None]
        column = torch.arange(self._prompts.longest, device=lengths.device)[None]
        blocked = column >= lengths
        return blocked if window is None else blocked | (lengths + step - column >= window)
