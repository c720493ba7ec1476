"""What a run is: every setting, typed, with its unit and its default.

No torch, no model code. Values come from these defaults, then from a YAML file, then from the command line;
`training/main.py --help` prints this page. Checks that need only the values are in `validate`; checks that read
files are in `training/preflight.py`. A check never changes a value.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

Algorithm = Literal["grpo", "ppo"]
RewardName = Literal["teacher_logprob", "minillm"]
DEMO = "demo"
"""A path with this value means: the embedded Faroese demo, built on first use."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model being trained."""

    path: str = DEMO
    """Hugging Face model directory (config.json, safetensors, tokenizer), a hub id, or `demo`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and compute type of the student, the reference and the critic. Log-softmax is always float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


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
class DataConfig:
    """Prompts, held-out questions and raw text. JSONL rows have `question` and may have `context`, `answers`, `id`."""

    prompts: str = DEMO
    """JSONL file of RL prompts (answers are not used), or `demo`."""
    warmup: str = DEMO
    """JSONL file of questions with answers for stage 1, or `demo`."""
    heldout: str = DEMO
    """JSONL file of held-out questions with answers, or `demo`."""
    text: str | None = DEMO
    """JSONL file with a `text` in each row, for L_PT; `demo`; or None."""
    template: str = "Spurningur: {question}\nSvar:"
    """How a question becomes a prompt."""
    context_template: str = "Tekstur: {context}\nSpurningur: {question}\nSvar:"
    """How a question with a context becomes a prompt."""
    max_prompt_tokens: int = 512
    """Longer prompts are counted and skipped."""
    text_block_tokens: int = 64
    """Tokens in one L_PT sequence."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the student answers."""

    group_size: int = 8
    """G: responses to each prompt. GRPO needs at least 2."""
    max_new_tokens: int = 64
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Softmax temperature of sampling and of every policy log-probability."""
    top_k: int = 0
    """Sample among the k likeliest tokens. 0: all."""
    top_p: float = 1.0
    """Sample within this probability mass. 1: all."""


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """Optimisation of the student with DeepSpeed."""

    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate from the end of warm-up to the last step."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moment decay rates."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    offload: bool = False
    """Keep the optimizer state in CPU memory (GPU runs, ZeRO 1 to 3)."""
    hybrid_engine: bool = True
    """Use DeepSpeed's hybrid engine, natively where no injected kernel exists."""
    micro_batch_tokens: int = 8192
    """Packed tokens in one forward and backward pass; a longer single group is run by itself."""
    updates_per_rollout: int = 1
    """Optimizer steps on one batch of samples; the prompts are dealt into that many mini-batches."""
    max_skipped: int = 10
    """Updates in a row that may be skipped for a non-finite loss or score before the run ends."""


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


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """From log-probabilities to token rewards (DESIGN: docs/algorithms.md)."""

    length_alpha: float = 1.0
    """teacher_logprob: the sum over a response is divided by T**alpha. 1: mean of a token, 0: plain sum."""
    length_normalize: bool = True
    """minillm: the long part is the mean, not the sum, of the rewards that follow."""
    gamma: float = 1.0
    """minillm: discount of the long part, in powers relative to the token."""
    exact_match_weight: float = 0.0
    """Weight of an extra part: 1 where the answer equals one of the data's answers. Needs answers in the prompts."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Group-relative advantages (arXiv 2402.03300)."""

    scale: Literal["group", "batch", "none"] = "group"
    """What centred scores are divided by: the standard deviation of the group, of the batch, or nothing."""
    epsilon: float = 1e-4
    """Added to the standard deviation."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Generalised advantage estimation (arXiv 1506.02438) and PPO's extras."""

    gamma: float = 1.0
    """Discount a token."""
    gae_lambda: float = 0.95
    """Lambda of GAE."""
    kl_penalty: float = 0.02
    """Coefficient of -(log pi_b - log pi_ref) in the reward: the fixed one, or the first of the adaptive one."""
    kl_target: float | None = None
    """Nats a token that the adaptive controller aims at. None: fixed coefficient."""
    kl_horizon: int = 1000
    """Responses over which the adaptive controller reacts."""
    value_clip: float = 0.2
    """Values move at most this far from their old ones in one update."""
    whiten: bool = True
    """Centre and scale the advantages over all tokens of the batch."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """L = L_policy + beta L_KL + lambda_PT L_PT + lambda_BC L_BC + lambda_1 L_single.

    The critic's L_value has an engine and an optimizer of its own, so it needs no weight here."""

    clip_low: float = 0.2
    """Lower clip of the importance ratio: 1 - clip_low."""
    clip_high: float = 0.2
    """Upper clip of the importance ratio: 1 + clip_high."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens (DAPO), over tokens then responses (GRPO), or a sum over a constant length (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or of the whole sequence (GSPO)."""
    policy_coef: float = 1.0
    """Weight of L_policy."""
    kl_coef: float = 0.0
    """beta, weight of the KL to the reference in the loss."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """Estimator of that KL as a loss. (k1 has no gradient in expectation: docs/algorithms.md.)"""
    pt_coef: float | None = None
    """lambda_PT, weight of the language-model loss on raw text. None: 0.1 with reward minillm, else 0."""
    pt_batch: int = 8
    """L_PT sequences a step, over all ranks."""
    bc_coef: float = 0.0
    """lambda_BC, weight of behaviour cloning on the warm-up answers."""
    bc_batch: int = 8
    """L_BC examples a step, over all ranks."""
    single_step_coef: float | None = None
    """lambda_1, weight of MiniLLM's exact single-step KL. None: 1 with minillm and equal tokenizers, else 0."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The held-out evaluation before and after."""

    questions: int | None = None
    """Held-out questions asked. None: all."""
    batch: int = 64
    """Questions answered at a time."""
    kl_samples: int = 1
    """Sampled answers a question for the reverse KL to the teacher."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Stage 1: supervised warm-up."""

    steps: int = 100
    """Optimizer steps."""
    batch: int = 32
    """Examples a step, over all ranks."""
    learning_rate: float = 1e-5
    """Peak learning rate; the rest of the optimizer is the actor's."""
    answers: Literal["data", "teacher"] = "data"
    """Train on the answers of the data set, or on the teacher's (asked through its server, cached on disk)."""
    output: str | None = None
    """Directory of the trained model. None: runs/NAME/export."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 50
    """Steps between checkpoints; one more is written at the end."""
    keep: int = 2
    """Checkpoints kept."""
    samples_every: int = 10
    """Steps between entries in samples.jsonl."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `--algo` and `--reward` choose one of the four approaches."""

    algo: Algorithm = "grpo"
    """Advantage estimator: group baseline (grpo) or critic (ppo)."""
    reward: RewardName = "minillm"
    """Reward: the teacher's log-likelihood, or MiniLLM's reverse-KL reward."""
    name: str | None = None
    """Name of the run's folder. None: ALGO-REWARD, and -seedSEED where the seed is not 0."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    cache_dir: str = "runs/cache"
    """Folder of what can be made again: demo models, teacher answers."""
    demo_size: Literal["demo", "tiny"] = "demo"
    """Size of the embedded demo's models; `tiny` is for tests and learns little."""
    seed: int = 0
    """Seed of sampling, data order and new weights."""
    steps: int = 100
    """RL steps."""
    prompts_per_step: int = 16
    """N: prompts sampled a step, over all ranks."""
    threads: int | None = None
    """CPU threads of each trainer process. None: the cores divided among the trainer's local ranks."""
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        return self.name or f"{self.algo}-{self.reward}" + (f"-seed{self.seed}" if self.seed else "")

    @property
    def pt_coef(self) -> float:
        """lambda_PT with its default resolved: MiniLLM trains on raw text unless told otherwise."""
        if self.loss.pt_coef is not None:
            return self.loss.pt_coef
        return 0.1 if self.reward == "minillm" and self.data.text is not None else 0.0


def require(condition: bool, key: str, value: object, mend: str) -> None:
    """Raise a ValueError that names the key, the value and the mend unless `condition` holds."""
    if not condition:
        raise ValueError(f"{key} = {value!r}: {mend}")


def _at_least(config: object, prefix: str, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= least, f"{prefix}{name}", value, f"must be at least {least:g}")


def _above_zero(config: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{prefix}{name}", value, "must be above 0")


def validate(config: RunConfig) -> None:
    """Check everything that the values alone decide. Raises ValueError naming key, value and mend."""
    sampling, loss = config.sampling, config.loss
    _at_least(config, "", 1, "steps", "prompts_per_step")
    _at_least(sampling, "sampling.", 1, "group_size", "max_new_tokens")
    _at_least(sampling, "sampling.", 0, "top_k")
    _above_zero(sampling, "sampling.", "temperature", "top_p")
    require(sampling.top_p <= 1, "sampling.top_p", sampling.top_p, "is a share of the probability mass: at most 1")
    require(
        config.algo != "grpo" or sampling.group_size >= 2,
        "sampling.group_size",
        sampling.group_size,
        "GRPO compares the responses of a group, so it needs at least 2 (4 to 16 are usual), or use --algo ppo",
    )
    _at_least(config.teacher, "teacher.", 1, "tensor_parallel", "threads", "max_batch_tokens", "logit_chunk")
    _above_zero(config.teacher, "teacher.", "timeout_s")
    _above_zero(config.actor, "actor.", "learning_rate", "max_grad_norm")
    _above_zero(config.critic, "critic.", "learning_rate")
    _at_least(config.actor, "actor.", 1, "micro_batch_tokens", "updates_per_rollout")
    _at_least(config.data, "data.", 2, "max_prompt_tokens", "text_block_tokens")
    for key in ("template", "context_template"):
        value = getattr(config.data, key)
        require("{question}" in value, f"data.{key}", value, "must contain {question}")
    require(
        "{context}" in config.data.context_template,
        "data.context_template",
        config.data.context_template,
        "must contain {context}",
    )
    require(0 < loss.clip_low < 1, "loss.clip_low", loss.clip_low, "must lie between 0 and 1")
    _above_zero(loss, "loss.", "clip_high")
    _at_least(loss, "loss.", 0, "policy_coef", "kl_coef", "bc_coef")
    for key in ("pt_coef", "single_step_coef"):
        value = getattr(loss, key)
        require(value is None or value >= 0, f"loss.{key}", value, "must be at least 0")
    require(
        not loss.pt_coef or config.data.text is not None,
        "loss.pt_coef",
        loss.pt_coef,
        "needs raw text: set data.text to a JSONL file with a `text` in each row",
    )
    _at_least(loss, "loss.", 1, "pt_batch", "bc_batch")
    require(
        config.prompts_per_step % config.actor.updates_per_rollout == 0,
        "prompts_per_step",
        config.prompts_per_step,
        f"must be a multiple of actor.updates_per_rollout ({config.actor.updates_per_rollout})",
    )
    _at_least(config.sft, "sft.", 1, "steps", "batch")
    _above_zero(config.sft, "sft.", "learning_rate")
    _at_least(config.eval, "eval.", 1, "batch", "kl_samples")
    _at_least(config.checkpoint, "checkpoint.", 1, "every", "keep", "samples_every")
    require(
        config.name is None or ("/" not in config.name and config.name not in ("", ".", "..")),
        "name",
        config.name,
        "must be a plain folder name; choose the parent with runs_dir",
    )


def as_dict(config: RunConfig) -> dict[str, object]:
    """Plain nested values, ready for YAML."""
    values = dataclasses.asdict(config)
    values["actor"]["betas"] = list(config.actor.betas)
    return values
