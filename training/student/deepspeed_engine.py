"""What the actor and the critic share of DeepSpeed: starting it, one engine from one module, gradients, checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # says what DeepSpeed would find out with a warning

import deepspeed
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime import compiler, hybrid_engine
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils.tensor_fragment import fragment_address

from configs.schema import ActorConfig
from inference.attention.packing import PackedRow
from training import distributed
from training.run import launcher
from training.run.safe_points import nothing
from training.student.passes import Passes

# A checkpoint is data: DeepSpeed asks torch.load to run whatever is pickled there, and this overrules it. Besides
# tensors and plain containers, these are all that DeepSpeed's files hold.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])

log = logging.getLogger(__name__)
_ROLLOUT = -1
"""Stands for a whole rollout among the submodules that use a parameter (DeepSpeed numbers them from 0)."""
Job = Callable[[], dict[str, torch.Tensor]]
"""A forward pass that returns weighted loss terms by name."""


def start_distributed(stuck_timeout_s: float = 900.0) -> None:
    """Join the trainer's process group: gloo on CPU, NCCL on CUDA. No collective gives up before the watchdog does,
    which says who is missing."""
    launcher.ensure_launcher_environment()
    deepspeed_logger.setLevel(logging.ERROR)
    # On CPU, DeepSpeed would compile a shared-memory collective (a minute, and a compiler on every node) that gloo
    # does as well at our sizes. It asks this table alone, which it would fill with a compiler's help.
    deepspeed.ops.__compatible_ops__ = {}
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        # A launcher may show each task its own GPU only, which is then number 0, for DeepSpeed too.
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=max(2 * stuck_timeout_s, 1800.0))
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)


@dataclass(frozen=True)
class Optimisation:
    """How one model is trained; the rest of the optimizer is ActorConfig's, for actor and critic alike."""

    learning_rate: float
    """Peak learning rate."""
    total_steps: int
    """Optimizer steps of the schedule."""
    zero_stage: int
    """DeepSpeed ZeRO stage."""
    dtype: str
    """float32 or bfloat16."""
    samples: bool = False
    """The model generates too: DeepSpeed's hybrid engine."""


def learning_rate(step: int, config: ActorConfig, options: Optimisation) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine to 0."""
    peak, warmup = options.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(options.total_steps - warmup, 1)
    if config.schedule == "linear":
        return peak * max(1.0 - done, 0.0)
    if config.schedule == "cosine":
        return peak * 0.5 * (1.0 + float(torch.cos(torch.tensor(min(done, 1.0) * torch.pi))))
    return peak


@contextlib.contextmanager
def _native_hybrid_engine() -> Iterator[None]:
    """The hybrid engine without injected kernels: they replace the layers that grouped attention needs, exist for few
    models and for none on CPU. Without families it stays native for every model, and needs no kernel's workspace.

    Nor does DeepSpeed compile its Muon optimizer, for which torch would load its compiler: it reads that file only to
    see that the optimizer is another."""
    hybrid_engine.replace_policies.clear()
    as_it_is = mock.patch.object(compiler, "compile", return_value=lambda function: function)
    with as_it_is, mock.patch.object(hybrid_engine, "WorkspaceOp", return_value=None):
        yield


class _Collected(TorchCheckpointEngine):
    """DeepSpeed's door to the disk: what it would write is collected, and what it reads are files of torch.save."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[tuple[Path, Any]] = []

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Whoever writes makes them."""

    def save(self, state_dict: Any, path: str) -> None:
        """Written by training/run/checkpoints.py."""
        self.states.append((Path(path), state_dict))


class Engine:
    """A module under DeepSpeed. Losses carry their global denominators, so gradients are summed over ranks."""

    def __init__(self, module: torch.nn.Module, config: ActorConfig, options: Optimisation) -> None:
        self._config, self._options = config, options
        self._said_no_room = False
        self.zero_stage = zero_stage = options.zero_stage
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._frozen = len(self._trained) < len(list(module.parameters()))
        optimizer = torch.optim.AdamW(
            self._trained,
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # Without ZeRO, DeepSpeed takes the norm of bfloat16 gradients in bfloat16: `update` clips there itself.
            "gradient_clipping": config.max_grad_norm if zero_stage > 0 else 0.0,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**12,
            "hybrid_engine": {"enabled": options.samples, "max_out_tokens": 1},
        }
        if options.dtype == "bfloat16":
            settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if config.offload and zero_stage > 0:
            settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        with contextlib.redirect_stdout(None), _native_hybrid_engine():
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        if zero_stage == 0 and distributed.world_size() == 1:
            # DeepSpeed would copy all gradients into one tensor, "reduce" it over one rank and copy them back.
            self.engine.enable_backward_allreduce = False
        if zero_stage == 0 and options.dtype == "bfloat16":
            # DeepSpeed makes the states by a step on zeros, which Adam's bias correction would take for a real one: the
            # first real step would be 0.73 of what it is at the other stages.
            for state in self.engine.optimizer.optimizer.state.values():
                state["step"].zero_()
        self.device = torch.device(self.engine.device)
        self.passes = Passes(config.micro_batch_tokens, self.device)
        """How packed rows reach the module."""
        self._collected = self.engine.checkpoint_engine = _Collected()
        # It would copy a script into each checkpoint, on rank 0 between two barriers, where a full disk means a hang.
        self.engine._copy_recovery_script = lambda save_path: None

    @property
    def module(self) -> torch.nn.Module:
        """The wrapped module; under ZeRO 3 its parameters are gathered as it runs."""
        return self.engine.module

    def __call__(self, row: PackedRow, **asked: Any) -> Any:
        """The module's forward pass over a packed row, as DeepSpeed has it for training."""
        return self.engine(row.to(self.device), **asked)

    def of_row(self, row: PackedRow, values_S: torch.Tensor) -> torch.Tensor:
        """What is said of the row's response tokens, out of the whole batch's, on the module's device."""
        return values_S[row.place_S.to(values_S.device)].to(self.device)  # the row may be there already

    def update(
        self, jobs: Sequence[Job], step: int, *, between: Callable[[], None] = nothing
    ) -> tuple[float, float, bool]:
        """One optimizer step on the sum of the jobs' losses over all ranks.

        Each job runs one forward pass and returns its terms, which are added up; all ranks give the same number of
        jobs. Returns (gradient norm before clipping, learning rate, applied). A non-finite gradient is skipped on every
        rank, and so is a step without a job (every group was dropped): DeepSpeed cannot step on no gradient.
        `between` is called before each job and may raise, which leaves the step.
        """
        rate = learning_rate(step, self._config, self._options)
        if not jobs:
            return 0.0, rate, False
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self._prepare_to_learn()
        # DeepSpeed averages over ranks; our losses are already divided by global counts.
        scale = distributed.world_size()
        for i, job in enumerate(jobs):
            between()
            self.engine.set_gradient_accumulation_boundary(i == len(jobs) - 1)
            self.engine.backward(torch.stack([*job().values()]).sum() * scale)
            distributed.beat()
        if self.zero_stage == 0:
            grads = [p.grad for p in self._trained if p.grad is not None]
            norm = float(sum(torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in grads)) ** 0.5
            if not torch.isfinite(torch.tensor(norm)):
                self.engine.zero_grad()
                self.module.eval()
                return norm, rate, False
            if norm > self._config.max_grad_norm:
                for gradient in grads:
                    gradient.mul_(self._config.max_grad_norm / norm)
        with contextlib.redirect_stdout(None):
            self.engine.step()
        if self.zero_stage > 0:
            norm = float(self.engine.get_global_grad_norm())
        self.module.eval()
        return norm, rate, not bool(getattr(self.engine.optimizer, "overflow", False))

    def _prepare_to_learn(self) -> None:
        """Evaluation mode but for layers that are recomputed in the backward pass, which look for training mode: it is
        also where Mixtral jitters what its experts get, and where Phi-MoE draws them (trap 19)."""
        for module in self.module.modules():
            module.training = getattr(module, "gradient_checkpointing", False) is True

    def gradient_norms(self, jobs: Sequence[Job], names: Sequence[str]) -> dict[str, float]:
        """Norm of each named term's gradient over all ranks, at the cost of a pass a term. No gradient is kept.

        Not under ZeRO 3, whose parameters are only whole within DeepSpeed's own backward pass. Collective.
        """
        self._prepare_to_learn()
        norms = {}
        for name in names:
            squares = [distributed.sum_in_place(total).float().square().sum() for total in self._summed(jobs, name)]
            norms[name] = float(torch.stack(squares).sum()) ** 0.5
        self.module.eval()
        return norms

    def _summed(self, jobs: Sequence[Job], name: str) -> list[torch.Tensor]:
        """This rank's gradient of one term over all jobs, a tensor a parameter."""
        sums = [torch.zeros_like(p) for p in self._trained]
        for job in jobs:
            term = job().get(name)
            if term is not None and term.requires_grad:
                grads = torch.autograd.grad(term, self._trained, materialize_grads=True)
                for total, grad in zip(sums, grads, strict=True):
                    total += grad
        return sums

    def gathered(self, parameters: Sequence[torch.nn.Parameter], *, write: bool = False) -> AbstractContextManager[Any]:
        """A context in which these parameters are whole; with `write`, rank 0's changes are kept. Collective."""
        if self.zero_stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """A context for a rollout. Under ZeRO 3 the weights are gathered once for all tokens where they fit on each
        rank, else for each token anew. Either way the ranks make the same passes: DeepSpeed records the order of the
        modules that run, and refuses orders that differ between ranks. Collective.
        """
        parameters: list[Any] = list(self.module.parameters())
        if self.zero_stage < 3 or distributed.any_rank(not self._room_for_all(parameters)):
            yield
            return
        with deepspeed.zero.GatheredParameters(parameters):
            for parameter in parameters:  # DeepSpeed's hooks let go of what no submodule is using
                parameter.ds_active_sub_modules.add(_ROLLOUT)
            try:
                yield
            finally:
                for parameter in parameters:
                    parameter.ds_active_sub_modules.discard(_ROLLOUT)

    def _room_for_all(self, parameters: Sequence[Any]) -> bool:
        """Whether all weights fit beside what is there, with half of the free memory left for caches."""
        need = sum(p.ds_numel * p.element_size() for p in parameters)
        if self.device.type == "cuda":  # with what torch keeps since the last update, and gives to whoever asks
            kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            free = torch.cuda.mem_get_info()[0] + kept
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need <= free / 2:
            return True
        if not self._said_no_room:
            log.warning(
                "actor.zero_stage = 3: the student's weights take %.1f GB, and %.1f are free, so that sampling gathers "
                "them for each token, which is slow; take more ranks, or stage 2",
                need / 1e9,
                free / 1e9,
            )
        self._said_no_room = True
        return False

    def save(self, directory: Path) -> list[tuple[Path, Any]]:
        """This rank's files of model (what is trained of it) and optimizer with their content, for
        training/run/checkpoints.py to write. Collective.

        Without ZeRO 3 the content is the live tensors: write it before the next update."""
        self.engine.save_checkpoint(
            str(directory.parent), tag=directory.name, save_latest=False, exclude_frozen_parameters=self._frozen
        )
        states, self._collected.states = self._collected.states, []
        return states

    def load(self, directory: Path) -> None:
        """Read what was written of `save`, or what `reshape` made of it. Collective."""
        settings = self.engine._config
        settings.load_universal_checkpoint = (directory / "zero").is_dir()
        try:
            path, _ = self.engine.load_checkpoint(
                str(directory.parent), tag=directory.name, load_module_strict=not self._frozen
            )
        finally:
            settings.load_universal_checkpoint = False
        if path is None:
            raise ValueError(f"checkpoint {directory} cannot be read by DeepSpeed")

    @staticmethod
    def reshape(source: Path, target: Path) -> None:
        """Make DeepSpeed's universal checkpoint of an engine's folder, which any number of ranks reads. Rank 0 alone.

        Not from stage 0, which has no partitions. Raises whatever the converter does.
        """
        settings = argparse.Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(settings)
