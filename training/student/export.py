"""The student as a Hugging Face model directory, at the end of a run."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from configs.io.hub import hub_id, is_adapter
from training import distributed
from training.run.stopping import RunFailed
from training.student.actor import Actor, end_list
from training.student.adapters import adapter_parameters, plain_parameters, save_adapter, save_plain
from training.student.loading import difference, load_policy

OTHER_INPUTS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What a model that also reads images or sound has beside its tokenizer."""


def export(actor: Actor, directory: Path) -> None:
    """Write the student as a Hugging Face model directory, replacing it in one move, and read it again: where it is
    not what was trained, RunFailed. An adapter is written as one too, into adapter/. Collective."""
    model, gathered = actor.policy.model, actor.engine.gathered
    state, adapter = _on_main(plain_parameters(model, gathered)), _on_main(adapter_parameters(model, gathered))
    if distributed.is_main():
        replace_directory(directory, partial(_write, actor, state, adapter))
    gap, limit = difference(actor.policy, directory, actor.dtype)
    if distributed.max_over_ranks(gap) > limit:
        raise RunFailed(
            f"{directory}: the exported model's log-probabilities are {gap} nats a token from the student's (limit "
            f"{limit:.2g}); the checkpoints are whole: report the model, and export again with a later version"
        )
    distributed.barrier()


@torch.no_grad()
def interpolate(actor: Actor, start: str | Path, rate: float) -> None:
    """Move the weights to start + rate * (now - start) (WARP, arXiv 2406.16768, eq. 5). Collective.

    For the end of a run: the optimizer's own copies are not moved.
    """
    origin = dict(load_policy(start, actor.dtype).model.named_parameters())
    for name, parameter in actor.policy.model.named_parameters():
        with actor.engine.gathered([parameter], write=True):
            plain = name.replace(".base_layer.", ".")
            if plain in origin and parameter.is_floating_point():  # not in 4 bits
                parameter.lerp_(origin[plain].to(parameter), 1.0 - rate)
            elif "lora_B" in name:
                parameter.mul_(rate)  # the adapter started at zero


def _on_main(parameters: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All of them, in the memory of rank 0; the others only walk along."""
    return {name: value.cpu().clone() for name, value in parameters if distributed.is_main()}


def _write(actor: Actor, state: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], directory: Path) -> None:
    model = actor.policy.model
    implementation = model.config._attn_implementation
    if ends := [end for end in actor.end_tokens if end not in end_list(model.generation_config)]:
        model.generation_config.eos_token_id = [*end_list(model.generation_config), *ends]
    # The exported directory must load without our attention function.
    model.config._attn_implementation = None
    quantization = model.config.__dict__.pop("quantization_config", None)
    save_plain(model, state, directory)
    if quantization is not None:
        model.config.quantization_config = quantization
    model.config._attn_implementation = implementation
    actor.tokenizer.save_pretrained(directory)
    for name in OTHER_INPUTS:  # as they were: only the language model was trained
        if (actor.path / name).is_file():
            shutil.copy(actor.path / name, directory / name)
    if adapter and not is_adapter(actor.path):  # one that was merged at the start has no directory to stand on
        save_adapter(model, adapter, hub_id(actor.path) or str(actor.path.resolve()), directory / "adapter")


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory beside `target`, then put it in its place, so that `target` is never half-written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = f".{target.name}.export-"
    for left in target.parent.glob(f"{glob.escape(beside)}*"):  # by a start that was killed: as large as a model
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=beside, ignore_cleanup_errors=True) as temporary:
        fresh, old = Path(temporary) / "new", Path(temporary) / "old"
        fresh.mkdir()
        write(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
