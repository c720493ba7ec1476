"""Settings of the models: student, reference, teacher, critic. configs/schema.py puts them into a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

DEMO = "demo"
"""A path with this value means: the embedded Faroese demo, built on first use."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Train a low-rank adapter in place of the whole student (LoRA, arXiv 2106.09685), through peft."""

    rank: int = 0
    """Rank of the update of each matrix. 0: no adapter, every parameter is trained."""
    alpha: int = 16
    """The update is scaled by alpha / rank."""
    targets: str = "all-linear"
    """Modules that get one: `all-linear`, or names with commas between (q_proj,v_proj)."""
    four_bit: bool = False
    """Hold the frozen weights in 4 bits (NF4, QLoRA, arXiv 2305.14314). Needs the package bitsandbytes."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model being trained."""

    path: str = DEMO
    """Hugging Face model directory (config.json, safetensors, tokenizer), a hub id, or `demo`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and compute type of the student, the reference and the critic. Log-softmax is always float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (the critic's too): less memory, about a third more time."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Train an adapter only."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen student that the KL term is measured against."""

    update: Literal["fixed", "every", "ema"] = "fixed"
    """Stays the start of the run; becomes the student every `every` steps; or follows it as a moving average."""
    every: int = 50
    """Steps between updates (`every`)."""
    decay: float = 0.99
    """Share of itself that the moving average keeps at each step (`ema`; WARP, arXiv 2406.16768, has 0.99)."""
    kl_limit: float | None = None
    """Nats a token of KL to the start of the run beyond which `kl_action` is taken. None: no limit."""
    kl_action: Literal["stop", "back_off"] = "stop"
    """Stop with a checkpoint; or halve the learning rate at each step beyond the limit, and double it back below."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen large model behind inference/serve_teacher.py."""

    path: str = DEMO
    """Hugging Face model directory (config.json, safetensors, tokenizer) or `demo`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and compute type. Log-probabilities are always reduced in float32."""
    tensor_parallel: int = 2
    """Processes that share one teacher. Must divide the number of attention heads."""
    address: str | None = None
    """`host:port` of a running server, or the path of its address file; several replicas with commas between. None:
    start one here, which ends with the trainer. The secret is read from the environment (GRPO_KD_TEACHER_SECRET)."""
    interface: str = "127.0.0.1"
    """Address that the server binds to. Only this one."""
    port: int = 0
    """TCP port of the server. 0: any free port."""
    threads: int = 1
    """CPU threads of each teacher process."""
    timeout_s: float = 600.0
    """Seconds that a client waits for a lost or slow teacher before the run is checkpointed and leaves with 75."""
    max_batch_tokens: int = 16384
    """Packed tokens in one teacher forward; larger requests are cut into several."""
    max_request_tokens: int = 4194304
    """Tokens that a single request may carry; a larger one ends its session."""
    max_request_rows: int = 65536
    """Responses that a single request may carry; more end its session."""
    max_cache_tokens: int = 65536
    """Tokens whose keys and values wait for the next decode step (`next`); the longest unused are dropped first."""
    max_sessions: int = 64
    """Clients served at a time; one more is refused."""
    logit_chunk: int = 1024
    """Tokens whose vocabulary logits are alive at once."""


@dataclass(frozen=True, kw_only=True)
class ExtraTeacherConfig(TeacherConfig):
    """One more teacher beside `teacher`, with the same settings; its tokenizer may be another one again."""

    name: str
    """Its part of the reward is logged as `reward/REWARD/NAME`."""
    weight: float = 1.0
    """Weight of its part of the reward; that of `teacher` is rewards.teacher_weight."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value model (PPO): a second DeepSpeed engine."""

    path: str | None = None
    """Hugging Face model directory of the backbone. None: the student's."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW; schedule and warm-up are the actor's."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    warmup_steps: int = 0
    """First steps in which only the critic is trained."""
