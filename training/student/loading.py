"""A Hugging Face model as a policy: read, held against transformers' own forward pass, and run the way that agrees."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.io.hub import has_tokenizer, is_adapter, tokenizer_home
from configs.schema import AdapterConfig
from inference.attention.packing import Group, pack_row
from inference.model.rounding import rounded_down
from inference.protocol.fingerprint import load_tokenizer
from training import distributed
from training.losses import without_columns
from training.student.adapters import add_adapter, merged_model, other_inputs, quantization
from training.student.policy import Policy, Way
from training.student.sampling import make_decoder

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Nats a token, mean absolute difference of two computations of the same log-probabilities."""
NOISE = 2.0
"""Times what one rounding of the embeddings changes in transformers' own computation, where that is more: what a
model makes of rounding grows with the size of its logits and with its depth."""


def load_policy(
    path: str | Path, dtype: str, *, gradient_checkpointing: bool = False, adapter: AdapterConfig | None = None
) -> Policy:
    """Read a Hugging Face model directory (or hub id) as a policy. Dropout is switched off.

    `adapter` of rank above 0: only that is trained. An adapter's directory gives its model with the adapter merged. Of
    a model with other inputs than text only the language model is trained. It is run in the fastest way that agrees
    with transformers (`settle`). Raises ValueError where none does.
    """
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if adapter is not None and adapter.four_bit:
        options["quantization_config"] = quantization(DTYPES[dtype])
    if is_adapter(path):
        if "quantization_config" in options:
            raise ValueError(
                f"student.adapter.four_bit = True: {str(path)!r} is an adapter itself; merge it into its model first"
            )
        try:
            model = merged_model(path, DTYPES[dtype])
        except Exception as error:  # another kind than weights (prompt tuning), or not of this model
            said = " ".join(str(error).split())[:300]
            raise ValueError(f"student.path = {str(path)!r}: the adapter cannot be merged ({said})") from None
    else:
        config = AutoConfig.from_pretrained(path)
        without_dropout(config)
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                path, config=config, output_loading_info=True, **options
            )
        except Exception as error:  # damaged, or quantised in a way whose library is not here
            said = " ".join(str(error).split())[:300]
            raise ValueError(f"student.path = {str(path)!r}: transformers does not load it ({said})") from None
        if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
            raise ValueError(
                f"student.path = {str(path)!r}: its weights lack {len(missing)} tensors ({missing[0]}, ...); "
                "the files are not of this model's class, or not all there"
            )
        with_weights = {name for name, module in model.named_modules() if any(True for _ in module.parameters(False))}
        beside = sorted(name for name in found["unexpected_keys"] if name.rpartition(".")[0] in with_weights)
        if beside and getattr(model, "hf_quantizer", None) is None:
            raise ValueError(
                f"student.path = {str(path)!r}: its weights have {len(beside)} tensors that config.json leaves out "
                f"({beside[0]}, ...); mend config.json (attention_bias, quantization_config)"
            )
    policy = Policy(model)
    policy.unknown_V = unknown_columns(path, policy.columns)
    # bitsandbytes repacks 4-bit weights in the first pass on a CPU that wants no gradient: merging could not read them.
    if model.device.type != "cpu" or "quantization_config" not in options:
        settle(policy, str(path))
    if adapter is not None and adapter.rank > 0:
        add_adapter(model, adapter)
    else:
        for parameter in other_inputs(model):
            parameter.requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


def without_dropout(config: Any) -> None:
    """Set every dropout of a transformers configuration to 0, in place (trap 19); and RWKV's `rescale_every`, by which
    it divides its weights in evaluation mode, where they would be exported."""
    for part in {id(one): one for one in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if ("drop" in name and isinstance(value, float)) or name == "rescale_every":
                setattr(part, name, type(value)(0))


@lru_cache(maxsize=4)
def unknown_columns(path: str | Path, count: int) -> torch.Tensor | None:
    """bool [count], true for columns of the vocabulary that no entry of the model's tokenizer has: rows that only fill
    the matrix up. None where there is none, and where the directory holds no tokenizer."""
    if not has_tokenizer(tokenizer_home(path)):  # transformers would make an empty one up
        return None
    unknown_V = torch.ones(count, dtype=torch.bool)
    unknown_V[[token for token in load_tokenizer(path).get_vocab().values() if token < count]] = False
    return unknown_V if bool(unknown_V.any()) else None


@torch.no_grad()
def settle(policy: Policy, path: str) -> None:
    """Leave the policy in the fastest `Way` in which training forward and sampling agree with transformers' own forward
    pass on a few made-up tokens. Raises ValueError where none does.

    It is the model itself with its own attention that is asked, so this costs no second copy of the weights.
    """
    started = time.perf_counter()
    groups = probe(policy)
    try:
        own_S = own_logprobs(policy, groups)
        noise = mean_gap(own_logprobs(policy, groups, rounded=True), own_S)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"student.path = {path!r}: transformers itself cannot run it ({reason})") from error
    limit = max(TOLERANCE.get(policy.model.dtype, 0.05), NOISE * noise)
    gap, reason, why = float("inf"), "", f"grouped attention does not reach {type(policy.model).__name__}"
    for way in list(Way)[list(Way).index(policy.way) :]:
        policy.run(way)
        try:
            gap = max(mean_gap(_trained(policy, groups), own_S), mean_gap(_decoded(policy, groups), own_S))
            reason = f"its log-probabilities are {gap:.2g} nats a token from transformers' own (limit {limit:.2g})"
        except Exception as error:  # a model's class may refuse in any way
            gap, reason = float("inf"), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if gap <= limit:
            break
        why = reason
    if gap > limit:
        raise ValueError(f"student.path = {path!r}: {type(policy.model).__name__} cannot be trained here: {reason}")
    if not policy.grouped:
        log.warning("%s: run in %s, where every response carries its prompt: %s", path, policy.way.value, why)
    log.info(
        "%s: in %s, log-probabilities within %.1e nats a token of transformers (checked in %.1f s)",
        path, policy.way.value, gap, time.perf_counter() - started,
    )  # fmt: skip


@torch.no_grad()
def difference(policy: Policy, directory: Path, dtype: str) -> tuple[float, float]:
    """Mean difference, nats a token, of the policy's log-probabilities from those of the model in `directory`, which is
    read on rank 0 alone (0 elsewhere), and the limit: it is computed on the CPU, which rounds otherwise than the
    policy's device. Collective under ZeRO 3."""
    groups = probe(policy)
    ours_S = _trained(policy, groups)
    noise = mean_gap(own_logprobs(policy, groups, rounded=True), own_logprobs(policy, groups))
    limit = 2 * max(TOLERANCE[policy.model.dtype], NOISE * noise if noise < float("inf") else 0.0)
    if not distributed.is_main():
        return 0.0, limit
    try:
        return mean_gap(_trained(load_policy(directory, dtype), groups), ours_S), limit
    except ValueError as error:
        log.error("%s", error)
        return float("inf"), limit


def probe(policy: Policy) -> list[Group]:
    """Two prompts with two responses each, over the whole vocabulary."""
    known = torch.arange(policy.columns) if policy.unknown_V is None else (~policy.unknown_V).nonzero()[:, 0]
    tokens = known[torch.linspace(1, len(known) - 1, 22).long()].tolist()
    first, second = Group(tuple(tokens[:7]), (tuple(tokens[7:11]), tuple(tokens[11:13]))), tokens[13:]
    return [first, Group(tuple(second[:3]), (tuple(second[3:5]), tuple(second[5:9])), 2)]


def own_logprobs(
    policy: Policy, groups: Sequence[Group], temperature: float = 1.0, *, rounded: bool = False
) -> torch.Tensor:
    """log pi of the response tokens by transformers' own forward pass, float32 [S]: a batch for each group, padded on
    the right, where a causal model does not look. `rounded`: with embeddings that are rounded once more, to see what
    rounding does to this model. Collective under ZeRO 3."""
    found = []
    with policy.as_transformers() as model, ExitStack() as stack:
        if rounded:
            embedding = model.get_input_embeddings()
            stack.enter_context(embedding.register_forward_hook(lambda _, __, embedded: rounded_down(embedded)))
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        for group in groups:
            longest, first = max(map(len, group.responses)), len(group.prompt)
            rows = [[*group.prompt, *r, *[group.prompt[0]] * (longest - len(r))] for r in group.responses]
            ids = torch.tensor(rows, device=model.device)
            options = {"logits_to_keep": longest + 1} if keeps else {}
            logits = model(input_ids=ids, use_cache=False, **options).logits[:, -longest - 1 : -1]
            for n, response in enumerate(group.responses):
                labels_R = ids[n, first : first + len(response)]
                found.append(_chosen(policy, logits[n, : len(response)], labels_R, temperature))
    return torch.cat(found)


def _chosen(policy: Policy, logits_SV: torch.Tensor, labels_S: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    scaled = without_columns(logits_SV, policy.unknown_V).float() / temperature
    return scaled.log_softmax(-1).gather(-1, labels_S[:, None])[:, 0].cpu()


def _trained(policy: Policy, groups: Sequence[Group]) -> torch.Tensor:
    """log pi of the response tokens by the training forward, float32 [S]."""
    return policy(pack_row(groups).to(policy.model.device)).logprobs_S.cpu()


def _decoded(policy: Policy, groups: Sequence[Group]) -> torch.Tensor:
    """log pi of the response tokens as sampling would have them, float32 [S]."""
    responses = [response for group in groups for response in group.responses]
    decoder = make_decoder(policy, [group.prompt for group in groups], len(responses) // len(groups), 8)
    logits = decoder.first_BV
    found: list[list[torch.Tensor]] = [[] for _ in responses]
    active = list(range(len(responses)))
    for step in range(max(map(len, responses))):
        for row, b in enumerate(active):
            label = torch.tensor([responses[b][step]], device=logits.device)
            found[b].append(_chosen(policy, logits[row][None], label))
        active = [b for b in active if len(responses[b]) > step + 1]
        if active:
            logits = decoder.advance(torch.tensor(active), torch.tensor([responses[b][step] for b in active]))
    return torch.cat([value for values in found for value in values])


def mean_gap(one_S: torch.Tensor, other_S: torch.Tensor) -> float:
    """Mean |difference|, nats a token; infinite where one is not a number."""
    gap = float((one_S - other_S).abs().mean())
    return gap if gap == gap else float("inf")
