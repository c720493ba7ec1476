"""Low-rank adapters on the student (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314), through peft.

The adapter starts at zero on top of `student.path`, whatever that was trained from; an adapter that is found there is
merged into its weights first. So switching it off gives exactly the start of the run, which is the true reference of
the KL term (trap 24).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from configs.schema import AdapterConfig
from training import distributed

log = logging.getLogger(__name__)


def merged_model(path: str | Path, dtype: torch.dtype) -> Any:
    """The model that a saved adapter belongs to, with the adapter merged into its weights. Dropout is switched off.

    Raises ValueError where it is on an output layer that is tied to the embedding, and whatever peft raises."""
    from peft import AutoPeftModelForCausalLM

    adapted = AutoPeftModelForCausalLM.from_pretrained(str(path), dtype=dtype)
    head, embedding = adapted.get_output_embeddings(), adapted.get_input_embeddings()
    if head in [layer for _, layer in _layers(adapted)] and head.weight is embedding.weight:
        raise ValueError("its output layer is tied to the embedding, which would change too; train it without lm_head")
    model = adapted.merge_and_unload()
    for module in model.modules():  # peft reads the model's configuration itself, dropout and all (trap 19)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.requires_grad_(True)  # peft has frozen it


def quantization(dtype: torch.dtype) -> Any:
    """How the frozen weights are held in 4 bits. Raises ValueError where bitsandbytes is missing."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError(
            "student.adapter.four_bit = True: the package bitsandbytes is not installed; pip install bitsandbytes, "
            "or set it to False"
        ) from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def add_adapter(model: Any, config: AdapterConfig) -> None:
    """Put a zero adapter beside each target matrix of the language model and freeze everything else, in place.

    Raises ValueError where no module has the name of a target, where that is an embedding or tied to one, and where it
    is a weight that holds all experts of a layer.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import ParamWrapper

    targets: Any = "all-linear"
    if config.targets != targets:
        targets = [name.strip() for name in config.targets.split(",")]
    other = other_inputs(model)
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM",
        exclude_modules=[n for n, m in model.named_modules() if any(p in other for p in m.parameters(False))] or None,
    )  # fmt: skip
    try:
        inject_adapter_in_model(lora, model)
    except ValueError as error:
        raise ValueError(f"student.adapter.targets = {config.targets!r}: {error}") from None
    names = [name for name, _ in _layers(model)]
    for target in targets if isinstance(targets, list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):  # peft asks for one of them alone
            raise ValueError(
                f"student.adapter.targets = {config.targets!r}: no matrix in it is called {target!r}; correct the name"
            )
    if fused := [name for name, layer in _layers(model) if isinstance(layer, ParamWrapper)]:  # peft's choice, by family
        others = {name.rpartition(".")[2] for name, layer in _layers(model) if not isinstance(layer, ParamWrapper)}
        raise ValueError(
            f"student.adapter.targets = {config.targets!r}: {fused[0]} holds the weights of all experts in one, whose "
            f"update cannot be merged here; set it to {','.join(sorted(others)) or 'q_proj,k_proj,v_proj,o_proj'}"
        )
    experts = [name for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in name]
    if experts and distributed.is_main():
        said = "no adapter for the experts' weights (%s and %d more): each holds those of all experts of a layer"
        log.info(said, experts[0], len(experts) - 1)
    embedding = model.get_input_embeddings().weight
    for name, layer in _layers(model):
        if layer.get_base_layer().weight is embedding:
            raise ValueError(
                f"student.adapter.targets = {config.targets!r}: {name} is the embedding, or the output layer that is "
                "tied to it, and one update cannot be merged into both; leave it out"
            )
    trained = model.dtype if model.dtype.is_floating_point else torch.float32
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained)


def other_inputs(model: Any) -> set[nn.Parameter]:
    """Parameters of towers for images and sound: nothing is learnt through them here."""
    if model.config.get_text_config() is model.config:
        return set()
    language = {p for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    return set(model.parameters()) - language


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's layers by name; none without an adapter."""
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before the adapter."""
    layers = [layer for _, layer in _layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def plain_parameters(model: nn.Module, gathered: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of the model without adapter, under its own name, with the adapter's update added.

    `gathered(list of parameters)` is a context in which they are whole (ZeRO 3). Collective under ZeRO 3: all ranks
    walk through all of it. Tensors are only valid until the next one.
    """
    adapted = dict(_layers(model))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        prefix = name.removesuffix(".base_layer.weight")
        layer = adapted.get(prefix) if prefix != name else None
        if layer is None:
            with gathered([parameter]):
                yield name.replace(".base_layer.", "."), parameter.detach()
            continue
        pair = [parameter, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        with gathered(pair):
            base = _whole(parameter)
            update = layer.get_delta_weight("default").to(base.dtype)
            yield f"{prefix}.weight", (base + update).detach()


def adapter_parameters(model: nn.Module, gathered: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapter's own parameters under peft's names; none without one. Collective as `plain_parameters`."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with gathered([parameter]):
                yield f"base_model.model.{name.replace('.default.', '.')}", parameter.detach()


def save_adapter(model: Any, state: dict[str, torch.Tensor], base: str, directory: Path) -> None:
    """Write `state` (names as peft's) as an adapter's directory, which belongs to the model `base` (path or hub id)."""
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(directory))
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """The weight itself, also where it is held in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter
    import bitsandbytes.functional

    return bitsandbytes.functional.dequantize_4bit(parameter.data, state)


def save_plain(model: Any, state: dict[str, torch.Tensor], directory: Path) -> None:
    """Write `state` (names as in the model without adapter) as a Hugging Face model directory, with what else the
    model's files hold: buffers that nobody trains (how DeepSeek's and GLM's experts are balanced)."""
    plain, buffers = model, dict(model.named_buffers())
    kept = {name.replace(".base_layer.", "."): buffers[name] for name in model.state_dict() if name in buffers}
    if any(True for _ in _layers(model)):
        with torch.device("meta"):
            plain = type(model)(model.config)
        plain.generation_config = model.generation_config
    plain.save_pretrained(directory, state_dict={**kept, **state})
