"""What the teacher is asked: log-probabilities, hidden states and answers, over packed rows, on every rank alike.

Every function here is collective: each tensor-parallel rank calls it with the same request. A rank holds the logits of
its own vocabulary columns, in float32 and for `chunk` positions at a time; what is exchanged is a maximum, a sum and
the few values that somebody asked for. Padded columns are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from inference.attention import PackedPlan
from inference.decoding import Decoding, Decodings
from inference.packing import Group, PackedRow, pack
from inference.teacher import Teacher
from inference.wire import Request

Evaluate = Callable[[PackedRow, torch.Tensor, torch.Tensor], list[torch.Tensor]]
BLOCK_COLUMNS = 8192
"""Vocabulary columns that a bfloat16 output layer is widened to float32 by at a time."""
WIDE_PRODUCT = "dtype" in torch.ops.aten.mm.overloads()
"""Whether this torch (2.8) has bfloat16 products with a float32 result, on CUDA only."""


class Scorer:
    """Runs requests on this rank's part of the teacher."""

    def __init__(
        self, teacher: Teacher, *, max_batch_tokens: int, logit_chunk: int, max_cache_tokens: int = 65536
    ) -> None:
        self.teacher = teacher
        self.max_batch_tokens = max_batch_tokens
        self.chunk = logit_chunk
        self.decodings = Decodings(teacher, max_batch_tokens=max_batch_tokens, max_cache_tokens=max_cache_tokens)

    def run(self, request: Request) -> list[torch.Tensor]:
        """The reply's tensors, complete on every rank; first dimension S (generate: see `generate`; open, next: A).

        StateLost on every rank, before anything is computed, where a `next` goes on from a decoding that is not held.
        """
        if request.kind == "generate":
            return list(self.generate(request))
        if request.kind == "release":
            self.decodings.release(request)
            return []
        if request.kind in ("open", "next"):
            hidden = self.decodings.open(request) if request.kind == "open" else self.decodings.next(request)
            return [t.cpu() for t in (self._topk(hidden, request) if request.k else [hidden])]
        if request.kind == "hidden":
            return self._assemble(request.groups, lambda _, hidden, __: [hidden])
        if request.kind == "topk":
            return self._assemble(request.groups, lambda _, hidden, __: self._topk(hidden, request))
        if request.kind == "gather":
            ids_SK = torch.tensor(request.extras, dtype=torch.int64).view(-1, request.k).to(self.teacher.device)
            return self._assemble(
                request.groups, lambda _, hidden, at: self._gather(hidden, ids_SK[at], request.temperature)
            )
        return self._assemble(
            request.groups,
            lambda row, hidden, _: [self._gather(hidden, row.labels_S[:, None], request.temperature)[0][:, 0]],
        )

    def _assemble(self, groups: Sequence[Group], evaluate: Evaluate) -> list[torch.Tensor]:
        """Run packed rows; `evaluate(row, hidden_SH, place_S)` gives their tensors, which are put in batch order."""
        lengths = [len(response) for group in groups for response in group.responses]
        starts = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
        outputs: list[torch.Tensor] = []
        for cpu_row in pack(groups, self.max_batch_tokens):
            place_S = starts[cpu_row.response_S] + cpu_row.offset_S
            row = cpu_row.to(self.teacher.device)
            if not len(place_S) and outputs:
                continue
            hidden = self.teacher.forward(row.tokens_T, row.positions_T, PackedPlan(row))[row.predict_S]
            values = evaluate(row, hidden, place_S)
            if not outputs:
                outputs = [value.new_empty(sum(lengths), *value.shape[1:], device="cpu") for value in values]
            for output, value in zip(outputs, values, strict=True):
                output[place_S] = value.cpu()
        return outputs

    def logits(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        """float32 logits [S, columns of this rank]. A bfloat16 product would already have rounded them."""
        weight = self.teacher.output_weight[: self.teacher.columns]
        if weight.dtype == torch.float32:
            return hidden_SH @ weight.T
        if weight.is_cuda and WIDE_PRODUCT:
            return torch.mm(hidden_SH, weight.T, out_dtype=torch.float32)
        hidden = hidden_SH.float()
        out = hidden.new_empty(hidden.shape[0], weight.shape[0])
        for start in range(0, weight.shape[0], BLOCK_COLUMNS):
            block = weight[start : start + BLOCK_COLUMNS].float()
            out[:, start : start + BLOCK_COLUMNS] = hidden @ block.T
        return out

    def _logsumexp(self, logits_SV: torch.Tensor) -> torch.Tensor:
        """float32 [S] over the whole vocabulary: the shifted sum of each rank, added up. Overwrites the logits."""
        # A rank may hold nothing but padding: it offers minus infinity and adds zero.
        empty = logits_SV.new_full((logits_SV.shape[0],), -torch.inf)
        peak = logits_SV.amax(-1) if logits_SV.shape[1] else empty
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        total = logits_SV.sub_(peak[:, None]).exp_().sum(-1)
        dist.all_reduce(total)
        return total.log_() + peak

    def _gather(self, hidden_SH: torch.Tensor, ids_SK: torch.Tensor, temperature: float) -> list[torch.Tensor]:
        """Log-probabilities [S, K] at the given ids, and the logsumexp [S] of the logits divided by the temperature.

        Vocabulary-parallel cross-entropy: each id's logit lives on one rank, the others add zero.
        """
        values, sums = [], []
        for hidden, ids in zip(hidden_SH.split(self.chunk), ids_SK.split(self.chunk), strict=True):
            logits = self.logits(hidden).div_(temperature)
            local = ids - self.teacher.first_column
            mine = (local >= 0) & (local < self.teacher.columns)
            if self.teacher.columns:
                picked = logits.gather(1, local.clamp(0, self.teacher.columns - 1)).masked_fill_(~mine, 0.0)
            else:
                picked = torch.zeros(ids.shape, device=logits.device)
            dist.all_reduce(picked)
            logsumexp = self._logsumexp(logits)
            values.append(picked - logsumexp[:, None])
            sums.append(logsumexp)
        return [torch.cat(values), torch.cat(sums)]

    def _topk(self, hidden_SH: torch.Tensor, request: Request) -> list[torch.Tensor]:
        """The K likeliest entries: log-probabilities [S, K], ids [S, K], logsumexp [S].

        Each rank offers its own K best; the best K of those are the best K of all.
        """
        values, indices, sums = [], [], []
        for hidden in hidden_SH.split(self.chunk):
            logits = self.logits(hidden).div_(request.temperature)
            kept = min(request.k, self.teacher.columns)
            offered = logits.new_full((logits.shape[0], request.k), -torch.inf)
            ids = torch.zeros(offered.shape, dtype=torch.int64, device=offered.device)
            if kept:
                offered[:, :kept], local = logits.topk(kept, -1)
                ids[:, :kept] = local + self.teacher.first_column
            logsumexp = self._logsumexp(logits)
            all_values, all_ids = _all_gather(offered, 1), _all_gather(ids, 1)
            best, order = all_values.topk(request.k, -1)
            values.append(best - logsumexp[:, None])
            indices.append(all_ids.gather(1, order))
            sums.append(logsumexp)
        return [torch.cat(values), torch.cat(indices), torch.cat(sums)]

    def generate(self, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers: (lengths int64 [N * samples], tokens int64 [sum of lengths]), ordered by prompt.

        Prompts are prefilled in packed rows; their samples decode against the one cache of the prompt. A response ends
        with one of the ids in `extras` (which belongs to it) or at max_new_tokens.
        """
        answers: dict[int, list[int]] = {}
        batch: list[Group] = []
        used = 0
        numbered = [Group(g.prompt, (), n) for n, g in enumerate(request.groups)]
        for group in sorted(numbered, key=lambda g: -len(g.prompt)):
            cost = len(group.prompt) + request.samples * request.max_new_tokens
            if batch and used + cost > self.max_batch_tokens:
                self._decode(batch, request, answers)
                batch, used = [], 0
            batch.append(group)
            used += cost
        self._decode(batch, request, answers)
        ordered = [answers[b] for b in range(len(request.groups) * request.samples)]
        lengths = torch.tensor([len(answer) for answer in ordered], dtype=torch.int64)
        return lengths, torch.tensor([token for answer in ordered for token in answer], dtype=torch.int64)

    def _decode(self, prompts: list[Group], request: Request, answers: dict[int, list[int]]) -> None:
        """Decode `samples` answers to each of these prompts, into `answers`."""
        samples = request.samples
        numbers = [g.first_response * samples + i for g in prompts for i in range(samples)]
        for b in numbers:
            answers[b] = []
        streams = [torch.Generator().manual_seed(request.seed * 1_000_003 + b & (1 << 63) - 1) for b in numbers]
        active = list(range(len(numbers)))
        decoding = Decoding(self.teacher, prompts, samples, request.max_new_tokens)
        hidden, ends = decoding.first_BH, set(request.extras)
        for step in range(request.max_new_tokens):
            tokens = self._choose(hidden, request.temperature, [streams[a] for a in active]).tolist()
            for a, token in zip(active, tokens, strict=True):
                answers[numbers[a]].append(token)
            left = [(a, token) for a, token in zip(active, tokens, strict=True) if token not in ends]
            if not left or step + 1 == request.max_new_tokens:
                return
            active = [a for a, _ in left]
            hidden = decoding.step(active, [token for _, token in left])

    def _choose(self, hidden_AH: torch.Tensor, temperature: float, streams: list[torch.Generator]) -> torch.Tensor:
        """The next token of each response, int64 [A].

        Sampling is the Gumbel-max trick: argmax of logits / temperature + noise. The noise is drawn for the whole
        vocabulary from the response's own stream, so that the answer depends on neither TP nor the batch.
        """
        teacher = self.teacher
        logits = self.logits(hidden_AH)
        if temperature > 0:
            noise = torch.stack([torch.empty(teacher.vocab_size).exponential_(generator=g) for g in streams])
            mine = noise[:, teacher.first_column : teacher.first_column + teacher.columns].to(logits.device)
            logits = logits / temperature - mine.log()
        if teacher.columns:
            best, index = logits.max(-1)
        else:
            best = logits.new_full((logits.shape[0],), -torch.inf)
            index = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
        values, ids = _all_gather(best[:, None], 1), _all_gather((index + teacher.first_column)[:, None], 1)
        # max, like torch.argmax over the whole vocabulary, takes the first of equals: ranks are in order of ids.
        return ids.gather(1, values.argmax(1, keepdim=True))[:, 0]


def _all_gather(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Every rank's tensor, side by side in order of rank."""
    if dist.get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)
