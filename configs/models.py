"""Settings of the models: student, reference, teacher, critic. configs/schema.py puts them into a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from configs.ranges import Finite, NonNegativeInt, PositiveFinite, PositiveFloat, PositiveInt

DEMO = "demo"
"""A path with this value means: the embedded Faroese demo, built on first use."""
DEMO_STAGE1 = "demo-stage1"
"""As student.path: the demo's student after stage 1, from which stage 2 starts anyway."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Train a low-rank adapter instead of the whole student (LoRA, arXiv 2106.09685), with peft."""

    rank: NonNegativeInt = 0
    """Rank of the update of each matrix. 0: no adapter, every parameter is trained."""
    alpha: PositiveInt = 16
    """The update is scaled by alpha / rank."""
    targets: str = "all-linear"
    """Modules that get an adapter: `all-linear`, or names separated by commas (q_proj,v_proj)."""
    four_bit: bool = False
    """Hold the frozen weights in 4 bits (NF4, QLoRA, arXiv 2305.14314). Needs the package bitsandbytes."""


@dataclass(frozen=True, kw_only=True)
class AskedConfig:
    """A model that answers questions, and its prompt format."""

    path: str = DEMO
    """Hugging Face model directory (config.json, safetensors, tokenizer), a hub id, or `demo`."""
    prompt: Literal["auto", "plain", "chat"] = "auto"
    """Prompt format: the text of data.template (plain), that text as a user's message in the tokenizer's chat template
    (chat), or chat if there is a template and plain otherwise (auto)."""
    system_prompt: str | None = None
    """System message before the user's message (chat)."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    """More arguments of the chat template, such as `{"enable_thinking": false}` (Qwen 3)."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig(AskedConfig):
    """The model being trained."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and compute type of the student, the reference and the critic. Log-softmax is always float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (the critic's too): less memory, about a third more time."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Train only an adapter."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen student that the KL term is measured against."""

    update: Literal["fixed", "every", "ema"] = "fixed"
    """The reference is the start of the run (fixed), is replaced by the student every `every` steps (every), or follows
    it as a moving average with decay 0.99 (ema; WARP, arXiv 2406.16768)."""
    every: PositiveInt = 50
    """Steps between updates (`every`)."""
    kl_limit: PositiveFloat | None = None
    """Stop the run, with a checkpoint, if the KL to its start exceeds this, in nats a token. None: no limit."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(AskedConfig):
    """The frozen large model behind inference/serve_teacher.py."""

    backend: str = "auto"
    """What runs it: `megatron`, `transformers` (any causal language model, one process, slower), `openai` (a vLLM or
    SGLang at `url`), or another row of BACKENDS (inference/model/backend.py). `auto`: `openai` where there is a `url`,
    else Megatron where it computes exactly what the model is."""
    url: str | None = None
    """Address where vLLM or SGLang already serves it (`http://host:8000/v1`). `path` is then read only for its
    tokenizer and config.json. The server's key is read from the environment (OPENAI_API_KEY)."""
    served_name: str | None = None
    """Name of the model at `url`. None: the only model there."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and compute type. Log-probabilities are always reduced in float32."""
    tensor_parallel: PositiveInt = 2
    """Processes over which one teacher is split. Must divide the number of attention heads. The transformers backend
    has one process, which spreads the layers over so many CUDA devices."""
    address: str | None = None
    """`host:port` of a running server, or the path of its address file; several replicas separated by commas. None: the
    trainer starts a server. The secret is read from the environment (GRPO_KD_TEACHER_SECRET)."""
    devices: str | None = None
    """CUDA devices of a server that the trainer starts, separated by commas, as in CUDA_VISIBLE_DEVICES. None: those
    that the trainer's ranks on this machine leave; if these are too few, the teacher shares theirs (with a warning)."""
    interface: str = "127.0.0.1"
    """Address that the server binds to."""
    port: int = 0
    """TCP port of the server. 0: any free port."""
    threads: PositiveInt = 1
    """CPU threads of each teacher process."""
    timeout_s: PositiveFloat = 600.0
    """Seconds that a trainer waits for a lost or slow teacher before it writes a checkpoint and exits with 75."""
    max_batch_tokens: PositiveInt = 16384
    """Packed tokens in one forward pass of the teacher; larger requests are split."""
    max_cache_tokens: PositiveInt = 65536
    """Tokens whose keys and values are kept for the next decoding step; the longest unused are dropped first."""
    logit_chunk: PositiveInt = 1024
    """Tokens whose vocabulary logits are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class ExtraTeacherConfig(TeacherConfig):
    """One more teacher, with the settings of `teacher`; its tokenizer may differ from both."""

    name: str
    """Its part of the reward is logged as `reward/REWARD/NAME`."""
    weight: Finite = 1.0
    """Weight of its part of the reward; that of `teacher` is rewards.teacher_weight."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value model (PPO): a second DeepSpeed engine, on a copy of the student's backbone."""

    learning_rate: PositiveFinite = 1e-5
    """Peak learning rate of AdamW; schedule and warm-up are the actor's."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
