"""Memory of a computation that is not run: the trainer's own code on the meta device, its tensors counted.

Activations are not estimated by a formula. The student's own forward and backward pass (training/student/policy.py, the
attention plans, transformers' layers, gradient checkpointing) run on tensors without data, and every storage is
counted from when it is made to when it is freed. So a change of that code changes the plan.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from configs.schema import RunConfig, SamplingConfig, StudentConfig
from inference.attention.decode import DecodePlan
from inference.attention.packed import PrefillPlan
from inference.attention.packing import Group, PackedRow, pack, pack_row
from training.student.adapters import add_adapter
from training.student.loading import DTYPES, without_dropout
from training.student.policy import Policy
from training.student.sampling import draw

META = torch.device("meta")
_INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
"""Operations that take indices of either device."""


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still alive, and their peak.

    Indices and masks stay on the CPU with their true values (shapes may depend on them), everything else has no data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it returns."""
        if func.overloadpacket not in _INDEXING and any(isinstance(a, torch.Tensor) and a.is_meta for a in args):
            args, kwargs = tree_map(_on_meta, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return out

    def ignore(self, module: nn.Module) -> None:
        """Parameters and buffers are counted elsewhere."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._known.add(tensor.untyped_storage()._cdata)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_meta and value.dim() > 0:
        return torch.empty_like(value, device=META)
    return value


_plain_attention = F.scaled_dot_product_attention


def _fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Attention as the fused kernels of CPU and CUDA keep it: never the [L, M] weights, which meta tensors would get.

    Both keep queries, keys, values, output, log-sum-exp, and the mask in the model's type.
    """
    if not query.is_meta:
        return _plain_attention(query, key, value, **kwargs)
    mask = kwargs["attn_mask"]
    bias = None if mask is None else torch.zeros(mask.shape, dtype=query.dtype, device=META)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(
        query, key, value, 0.0, kwargs.get("is_causal", False), attn_mask=bias, scale=kwargs.get("scale")
    )[0]  # fmt: skip


def fused_attention() -> Any:
    """Context in which meta tensors take `_fused_attention`. A function mode would be off in recomputed passes."""
    return mock.patch.object(F, "scaled_dot_product_attention", _fused_attention)


def meta_policy(model_config: Any, student: StudentConfig, layers: int | None = None) -> Policy:
    """What `load_policy` gives, without weights. `model_config`: transformers' configuration of the text model.

    `layers`: only the first ones. Raises ValueError for a model that grouped attention does not reach.
    """
    from transformers import AutoModelForCausalLM

    model_config = copy.deepcopy(model_config)
    if layers is not None:
        model_config.num_hidden_layers = layers
        if getattr(model_config, "layer_types", None):
            model_config.layer_types = model_config.layer_types[:layers]
    without_dropout(model_config)
    model_config.pad_token_id = None  # GPT-2's class looks for it among the tokens, which have no values here
    with META:
        model = AutoModelForCausalLM.from_config(model_config, dtype=DTYPES[student.dtype])
    policy = Policy(model)
    if not policy.grouped:
        raise ValueError(f"student.path: {type(model).__name__} runs in plain rows, which --plan does not know")
    if student.adapter.rank > 0:
        with META:
            add_adapter(model, student.adapter)
    if student.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.base_model.register_forward_pre_hook(_inputs_on_meta, with_kwargs=True)
    return policy


def _inputs_on_meta(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    for name in {"input_ids", "position_ids"} & kwargs.keys():
        kwargs[name] = _on_meta(kwargs[name])
    return args, kwargs


class UpdatePeaks(NamedTuple):
    """Peaks of forward and backward passes above the parameters, bytes."""

    activations: int
    """Gradients of parameters are handed away as they come (ZeRO 2 and 3)."""
    first: int
    """Gradients of parameters gather while activations go: the first packed row of an optimizer step."""
    later: int
    """All gradients are there already: each further packed row."""


def update_peaks(module: nn.Module, loss: Callable[[], torch.Tensor]) -> UpdatePeaks:
    """Count `loss().backward()`. The module is left without gradients."""
    module.train()
    tracker = LiveBytes()
    tracker.ignore(module)
    handles = []
    with fused_attention(), tracker:
        loss().backward()
        first, tracker.peak = tracker.peak, tracker.live
        loss().backward()
        later = tracker.peak
        module.zero_grad()
        for p in module.parameters():
            if p.requires_grad:
                handles.append(p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)))
        tracker.peak = tracker.live
        loss().backward()
    for handle in handles:
        handle.remove()
    return UpdatePeaks(tracker.peak, first, later)


@torch.no_grad()
def forward_peak(module: nn.Module, forward: Callable[[], object]) -> int:
    """Peak of a forward pass without gradients, bytes above the parameters."""
    module.eval()
    tracker = LiveBytes()
    tracker.ignore(module)
    with fused_attention(), tracker:
        forward()
    return tracker.peak


@torch.no_grad()
def sampling_peak(policy: Policy, sampling: SamplingConfig, prompts: int, prompt_tokens: int) -> tuple[int, int]:
    """Of one prefill and the longest decoding step of training/student/sampling.py, all responses active: (peak, what
    the step makes of it), bytes above the parameters."""
    policy.eval()
    batch = prompts * sampling.group_size
    tracker = LiveBytes()
    tracker.ignore(policy)
    with fused_attention(), tracker:
        row = pack_row([Group(prompt=(0,) * prompt_tokens, responses=())] * prompts)
        prefill = PrefillPlan(row)
        hidden = policy.hidden(row.tokens_T, row.positions_T, prefill)
        last = torch.cumsum(prefill.cache.lengths_N, 0) - 1
        logits = policy.logits(hidden[last]).repeat_interleave(sampling.group_size, 0)
        plan = DecodePlan(prefill.cache, sampling.group_size, sampling.max_new_tokens)
        rows = torch.arange(batch)
        for step in range(sampling.max_new_tokens):
            if step == sampling.max_new_tokens - 1:
                before, tracker.peak = tracker.peak, tracker.live
                kept = tracker.live
            positions = plan.advance(rows) if step else prefill.cache.lengths_N
            if step in (0, sampling.max_new_tokens - 1):
                logprobs = (logits.float() / sampling.temperature).log_softmax(-1)
                draw(logprobs, torch.zeros(batch, dtype=torch.float64))
                if step:
                    hidden = policy.hidden(torch.zeros(batch, dtype=torch.int64), positions, plan)
                    logits = policy.logits(hidden)
    return max(before, tracker.peak), tracker.peak - kept


def longest_row(config: RunConfig, prompts: int, prompt_tokens: int, budget: int | None = None) -> PackedRow:
    """The largest packed row: as many full-length groups as fit, at least one. `budget`: None: an update's."""
    sampling = config.sampling
    groups = [
        Group((0,) * prompt_tokens, ((0,) * sampling.max_new_tokens,) * sampling.group_size, n * sampling.group_size)
        for n in range(prompts)
    ]
    return pack(groups, budget or config.actor.micro_batch_tokens)[0]
