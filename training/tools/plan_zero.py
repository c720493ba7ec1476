"""What DeepSpeed holds for one engine and rank, from the sizes of its parameters alone.

Read from DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, fp16/unfused_optimizer.py) and held against
measured memory by tests/training/tools/test_plan.py. Names as there: n trainable parameters, b bytes of one in the
model's type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.tools.plan_trace import UpdatePeaks

BUCKET = 500_000_000
"""Elements of the buffer that gradients are reduced in (`reduce_bucket_size`)."""
SUB_GROUP = 1_000_000_000
"""ZeRO 3: elements that one optimizer step handles at a time (`sub_group_size`)."""
MAX_LIVE = 1_000_000_000
"""ZeRO 3: most elements of other ranks' parameters that are present at a time (`max_live_parameters`)."""
PREFETCH = 50_000_000
"""ZeRO 3: elements that are fetched ahead together (`prefetch_bucket_size`), and the last one that crosses it."""
PERSISTENT = 100_000
"""ZeRO 3: parameters with fewer elements stay whole on every rank (`param_persistence_threshold`)."""

Device = Literal["cuda", "cpu"]
"""On a card a buffer counts whole when it is made, and Adam works on all its tensors at once. In CPU memory only the
part of a buffer that is written to counts, and Adam works on one tensor at a time."""


@dataclass(frozen=True)
class Parameters:
    """Sizes of a module's parameters."""

    total: int
    """Elements of all of them."""
    trainable: int
    """n: elements that are trained."""
    largest: int
    """Elements of the largest one that is trained."""
    small: int
    """Elements of those below PERSISTENT."""
    element: int
    """b: bytes of an element, 2 or 4."""


@dataclass(frozen=True)
class EngineSettings:
    """How one engine is run."""

    zero_stage: int
    world: int
    offload: bool
    device: Device

    @property
    def offloads(self) -> bool:
        """Optimizer state in host memory; without ZeRO there is no such thing."""
        return self.offload and self.zero_stage > 0


def share(numel: int, world: int) -> int:
    """Elements of one rank's part of a flat buffer, which is padded to an even part for each rank."""
    return -(-numel // (2 * world)) * 2


def engine_state(p: Parameters, s: EngineSettings) -> tuple[dict[str, int], int]:
    """(what an engine holds between updates, once Adam's moments exist, which is after the first; what is offloaded to
    the host's memory), bytes. `optimizer`: float32 master weights (where kept) and Adam's two moments."""
    part, b, n = share(p.trainable, s.world), p.element, p.trainable
    frozen = p.total - n
    if s.zero_stage == 0:
        # float32: Adam works on the parameters themselves. bfloat16: FP16_UnfusedOptimizer keeps a float32 copy.
        return {"parameters": b * p.total, "optimizer": (8 if b == 4 else 12) * n}, 0
    parameters, gradients, buckets = b * p.total, 0, 0
    if s.zero_stage == 3:
        whole = b * p.small if s.world > 1 else 0
        parameters = b * (part + share(frozen, s.world)) + whole
        gradients = b * part  # grad_partitions_flat_buffer
        buckets = b * (BUCKET if s.device == "cuda" else min(BUCKET, n))  # made once, never freed
    # Master weights are a copy even in float32: stage 3 compares a torch.device with a string and finds no match.
    optimizer = 12 * part
    if not s.offloads:
        held = {"parameters": parameters, "optimizer": optimizer, "gradients": gradients}
        return held | {"communication buffers": buckets}, 0
    staging = 0 if s.zero_stage == 3 else b * p.largest  # temp_grad_buffer_for_gpu_offload
    host = optimizer + 4 * part + (gradients if s.zero_stage == 3 else b * (part + p.largest))
    return {"parameters": parameters, "communication buffers": buckets + staging}, host


def update_peak(p: Parameters, s: EngineSettings, peaks: UpdatePeaks, rows: int) -> int:
    """Peak of one optimizer step above `engine_state`, bytes: passes over `rows` packed rows, reduction, Adam."""
    return max(_passes(p, s, peaks, rows), _reduction(p, s), _adam(p, s))


def _passes(p: Parameters, s: EngineSettings, peaks: UpdatePeaks, rows: int) -> int:
    """Forward and backward passes with the gradients and buffers that are there meanwhile."""
    part, b = share(p.trainable, s.world), p.element
    grown = peaks.later if rows > 1 else peaks.first
    cuda = s.device == "cuda"
    if s.zero_stage == 0:
        return grown
    if s.zero_stage == 1:
        return grown + (b * BUCKET if cuda else 0)  # made at the first gradient of each backward pass
    earlier = b * part if rows > 1 and not s.offloads else 0  # this rank's gradients of the rows before
    if s.zero_stage == 2:
        # On a card the bucket is whole from the start; where it overflows, a flat copy is made in mid-pass.
        if cuda:
            return peaks.activations + b * (BUCKET + p.largest) + _flat_copy(p, s, only_overflow=True) + earlier
        return peaks.first + earlier
    return peaks.activations + _gathered(p, s) + b * p.largest * cuda + _flat_copy(p, s, only_overflow=True)


def _gathered(p: Parameters, s: EngineSettings) -> int:
    """ZeRO 3: other ranks' parameters in a pass that is trained on.

    What is used again within 10**9 elements is kept, so up to MAX_LIVE are present; and the flat buffer of a fetch
    lives until the last of its parameters has been used (AllGatherCoalescedHandle.partitions).
    """
    large = p.total - p.small
    fetch = min(large - p.largest, PREFETCH + p.largest)  # the first parameter is fetched by itself
    return p.element * (min(large, MAX_LIVE) + fetch) if s.world > 1 else 0


def forward_extra(p: Parameters, s: EngineSettings) -> int:
    """ZeRO 3: what a pass without gradients (sampling, values) adds: one parameter, as it came and put together."""
    return 2 * p.element * p.largest if s.zero_stage == 3 and s.world > 1 else 0


def _flat_copy(p: Parameters, s: EngineSettings, *, only_overflow: bool = False) -> int:
    """The copy of a bucket that is sent: gradients of several owners are joined for the collective."""
    if only_overflow and p.trainable <= BUCKET:
        return 0
    joined = s.world > 1 or s.zero_stage == 3  # a bucket with one owner is sent as it is, one rank's not at all
    return p.element * min(BUCKET, p.trainable) if joined else 0


def _reduction(p: Parameters, s: EngineSettings) -> int:
    """After the last backward pass: gradients, buckets and copies."""
    n, part, b = p.trainable, share(p.trainable, s.world), p.element
    bucket = b * (BUCKET if s.device == "cuda" else 0)
    if s.zero_stage == 0:
        return b * n + _flat_copy(p, s)
    if s.zero_stage == 1:
        # Gradients move into the bucket; this rank's are copied out of it again.
        return b * n + bucket + max(_flat_copy(p, s), b * part)
    if s.zero_stage == 2:
        touched = bucket or b * min(n, BUCKET)
        return touched + max(_flat_copy(p, s), b * part) + b * part
    return _flat_copy(p, s)


def _adam(p: Parameters, s: EngineSettings) -> int:
    """The optimizer step: float32 gradients of this rank's part; the fused AdamW has no temporaries."""
    if s.offloads:
        return 0  # on the host
    n, part, b = p.trainable, share(p.trainable, s.world), p.element
    if s.zero_stage == 0:
        return b * n + (4 * n if b == 2 else 0)
    if s.zero_stage == 3:
        part = min(part, SUB_GROUP)
    kept = b * part if s.zero_stage < 3 else 0  # gradients that the flat copy is made from
    flat = kept + b * part + (4 * part if b == 2 else 0)
    return max(flat, 4 * part)
