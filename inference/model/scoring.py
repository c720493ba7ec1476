"""The teacher's answers: log-probabilities, hidden states and text, over packed rows, on every rank alike.

Every method that takes a request is collective: each tensor-parallel rank calls it with the same one. A rank holds the
logits of its own vocabulary columns, in float32 and for `chunk` positions at a time; what is exchanged is a maximum, a
sum and the few values that somebody asked for. Padded columns are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
import torch.distributed as dist

from inference.attention.packed import PackedPlan
from inference.attention.packing import Group, PackedRow, in_batch_order, pack, within
from inference.model.decoding import Decoding, Decodings
from inference.model.files import end_ids
from inference.model.output_layer import fingerprint_of, output_layer_hash
from inference.model.teacher import Teacher
from inference.protocol.replies import TeacherInfo
from inference.protocol.wire import Request

Evaluate = Callable[[PackedRow, torch.Tensor], list[torch.Tensor]]
BLOCK_COLUMNS = 8192
"""Vocabulary columns that a bfloat16 output layer is widened to float32 by at a time."""
WIDE_PRODUCT = "dtype" in torch.ops.aten.mm.overloads()
"""Whether this torch (2.8) has bfloat16 products with a float32 result, on CUDA only."""


class Scorer:
    """This rank's part of a Megatron teacher, as `inference.model.backend.Backend` describes it."""

    def __init__(
        self, teacher: Teacher, *, max_batch_tokens: int, logit_chunk: int, max_cache_tokens: int = 65536
    ) -> None:
        """The last three as in teacher.max_batch_tokens and so on."""
        self.teacher = teacher
        self.max_batch_tokens = max_batch_tokens
        self.chunk = logit_chunk
        self.layers, self.first_layers = teacher.architecture.layers, teacher.first_layers
        self._decodings = Decodings(teacher, max_batch_tokens=max_batch_tokens, max_cache_tokens=max_cache_tokens)

    @cached_property
    def info(self) -> TeacherInfo:
        """What clients may know."""
        path, a = self.teacher.path, self.teacher.architecture
        return TeacherInfo(
            model=path.resolve().name,
            vocab_size=a.vocab_size,
            hidden_size=a.hidden_size,
            dtype=str(self.teacher.dtype).removeprefix("torch."),
            max_positions=a.max_positions,
            eos_ids=end_ids(path),
            tokenizer_fingerprint=fingerprint_of(path),
            output_layer=output_layer_hash(path),
        )

    def parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        """This rank's weights by their names in Megatron."""
        return self.teacher.model.named_parameters()

    def score(self, request: Request) -> list[torch.Tensor]:
        """Log-probabilities [S] of the response tokens."""
        return self._of_tokens(request, lambda row, hidden: [self._logprobs(hidden, row.labels_S, request.temperature)])

    def topk(self, request: Request) -> list[torch.Tensor]:
        """The K likeliest entries: log-probabilities [S, K] and ids [S, K]."""
        return self._of_tokens(request, lambda _, hidden: self._likeliest(hidden, request.k, request.temperature))

    def hidden(self, request: Request) -> list[torch.Tensor]:
        """States after the final norm [S, Hidden], in the model's type, on rank 0 alone: every rank has the same."""
        return self._of_tokens(request, lambda _, hidden: [hidden] if dist.get_rank() == 0 else [])

    def answer(self, request: Request) -> list[torch.Tensor]:
        """Answers: lengths int64 [N], tokens int64 [sum of lengths], ordered by prompt.

        Prompts are prefilled in packed rows, and each answer decodes against its prompt's cache. It ends with one of
        the request's `ids` (which belongs to it) or at max_new_tokens.
        """
        answers: dict[int, list[int]] = {}
        numbered = sorted((Group(g.prompt, (), n) for n, g in enumerate(request.groups)), key=lambda g: -len(g.prompt))
        longest = request.max_new_tokens
        for batch in within(numbered, lambda g: len(g.prompt) + longest, self.max_batch_tokens):
            self._decode(batch, request, answers)
        ordered = [answers[n] for n in range(len(request.groups))]
        lengths = torch.tensor([len(answer) for answer in ordered], dtype=torch.int64)
        return [lengths, torch.tensor([token for answer in ordered for token in answer], dtype=torch.int64)]

    def open(self, request: Request) -> list[torch.Tensor]:
        """States [A, Hidden] that predict the next token of the responses that grow."""
        return [self._decodings.open(request).cpu()]

    def next(self, request: Request) -> list[torch.Tensor]:
        """The same after one more token. StateLost on every rank, before anything is computed, where nothing is held
        that this goes on from."""
        return [self._decodings.next(request).cpu()]

    def release(self, request: Request) -> list[torch.Tensor]:
        """Forget the session's decoding."""
        self._decodings.release(request)
        return []

    def _of_tokens(self, request: Request, evaluate: Evaluate) -> list[torch.Tensor]:
        """`evaluate(row, hidden_SH)` of each packed row, its tensors put in batch order."""
        rows: list[PackedRow] = []
        found: list[list[torch.Tensor]] = []
        for cpu_row in pack(request.groups, self.max_batch_tokens):
            if not len(cpu_row.labels_S) and found:
                continue
            row = cpu_row.to(self.teacher.device)
            hidden_SH = self.teacher.forward(row.tokens_T, row.positions_T, PackedPlan(row))[row.predict_S]
            rows.append(cpu_row)
            found.append([to_host(value) for value in evaluate(row, hidden_SH)])
        if self.teacher.device.type == "cuda":
            torch.cuda.synchronize()  # once a request: the copies have been under way beside the next rows' work
        return [in_batch_order(rows, values) for values in zip(*found, strict=True)]

    def logits(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        """float32 logits [S, columns of this rank]."""
        logits, cap = self._product(hidden_SH), self.teacher.architecture.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _product(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        """The same before any soft cap. A bfloat16 product would already have rounded them."""
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
        peak = logits_SV.amax(-1)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        total = logits_SV.sub_(peak[:, None]).exp_().sum(-1)
        dist.all_reduce(total)
        return total.log_() + peak

    def _logprobs(self, hidden_SH: torch.Tensor, labels_S: torch.Tensor, temperature: float) -> torch.Tensor:
        """float32 [S] log-probabilities of the labels.

        Vocabulary-parallel cross-entropy: each label's logit lives on one rank, the others add zero.
        """
        values = []
        for hidden, labels in zip(hidden_SH.split(self.chunk), labels_S.split(self.chunk), strict=True):
            logits = self.logits(hidden).div_(temperature)
            local = labels - self.teacher.first_column
            mine = (local >= 0) & (local < self.teacher.columns)
            at = local.clamp(0, self.teacher.columns - 1)[:, None]
            picked = logits.gather(1, at)[:, 0].masked_fill_(~mine, 0.0)
            dist.all_reduce(picked)
            values.append(picked - self._logsumexp(logits))
        return torch.cat(values)

    def _likeliest(self, hidden_SH: torch.Tensor, k: int, temperature: float) -> list[torch.Tensor]:
        """The K likeliest entries: log-probabilities [S, K] and ids [S, K].

        Each rank offers its own K best; the best K of those are the best K of all.
        """
        values, indices = [], []
        for hidden in hidden_SH.split(self.chunk):
            logits = self.logits(hidden).div_(temperature)
            kept = min(k, self.teacher.columns)
            offered = logits.new_full((logits.shape[0], k), -torch.inf)
            ids = torch.zeros(offered.shape, dtype=torch.int64, device=offered.device)
            offered[:, :kept], local = logits.topk(kept, -1)
            ids[:, :kept] = local + self.teacher.first_column
            all_values, all_ids = _all_gather(offered), _all_gather(ids)
            best, order = all_values.topk(k, -1)
            values.append(best - self._logsumexp(logits)[:, None])
            indices.append(all_ids.gather(1, order))
        return [torch.cat(values), torch.cat(indices)]

    def _decode(self, prompts: list[Group], request: Request, answers: dict[int, list[int]]) -> None:
        """Decode an answer to each of these prompts, into `answers`."""
        numbers = [group.first_response for group in prompts]
        for b in numbers:
            answers[b] = []
        device = self.teacher.device
        seeds = request.streams
        streams = [torch.Generator(device).manual_seed(seeds[b]) for b in numbers]
        active = list(range(len(numbers)))
        decoding = Decoding(self.teacher, prompts, 1, request.max_new_tokens)
        hidden, ends = decoding.first_BH, set(request.ids)
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
        vocabulary from the response's own stream, on the device, so that the answer depends on neither TP nor the
        batch (on CUDA it is another one than on the CPU).
        """
        teacher = self.teacher
        logits = self.logits(hidden_AH)
        if temperature > 0:
            noise = torch.empty(len(streams), teacher.vocab_size, device=logits.device)
            for row, stream in zip(noise, streams, strict=True):
                row.exponential_(generator=stream)
            mine = noise[:, teacher.first_column : teacher.first_column + teacher.columns]
            logits = logits / temperature - mine.log()
        best, index = logits.max(-1)
        values, ids = _all_gather(best[:, None]), _all_gather((index + teacher.first_column)[:, None])
        # max, like torch.argmax over the whole vocabulary, takes the first of equals: ranks are in order of ids.
        return ids.gather(1, values.argmax(1, keepdim=True))[:, 0]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU; from CUDA into pinned memory, where it is only after the next synchronisation."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Every rank's columns, side by side in order of rank."""
    if dist.get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, 1)
