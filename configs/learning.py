"""Settings of learning: sampling, optimisation, rewards, advantages, losses. configs/schema.py puts them into a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.ranges import (
    AtLeastOne,
    ClosedUnitInterval,
    Finite,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFinite,
    PositiveFloat,
    PositiveInt,
    ZeroToBelowOne,
)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the student answers."""

    group_size: PositiveInt = 8
    """G: responses to each prompt. GRPO needs at least 2."""
    max_new_tokens: PositiveInt = 64
    """Longest response, in tokens."""
    temperature: PositiveFinite = 1.0
    """Softmax temperature of sampling and of every policy log-probability."""
    prompts_at_once: NonNegativeInt = 0
    """Prompts that a rank samples at a time: the cache is smaller, and the teacher scores them while the next ones are
    sampled. 0: all prompts of the step."""
    teacher_mix: ZeroToBelowOne = 0.0
    """alpha: share of the teacher in what is sampled from (MiniLLM, arXiv 2306.08543, section 2.2). 0: student only."""
    mix_by: Literal["token", "response"] = "token"
    """Mix at each token (equal tokenizers), or let the teacher write whole responses (any tokenizers)."""
    mix_weight: Literal["token", "sequence"] = "token"
    """Importance weight of mixed samples: pi/q of the token (the paper's approximation, less variance), or of the
    whole response (exact)."""


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """Optimisation of the student with DeepSpeed."""

    learning_rate: PositiveFinite = 1e-6
    """Peak learning rate of AdamW in stage 2. Stages 0 and 1 take sft.learning_rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate from the end of warm-up to the last step."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    offload: bool = False
    """Keep the optimizer state in CPU memory (GPU runs, ZeRO 1 to 3)."""
    micro_batch_tokens: PositiveInt = 8192
    """Packed tokens in one forward and backward pass; a single group that is longer gets a pass of its own."""
    updates_per_rollout: PositiveInt = 1
    """Optimizer steps on one batch of samples, whose prompts are divided on each rank into that many mini-batches."""
    max_skipped: PositiveInt = 10
    """End the run after so many updates in a row were skipped because of a non-finite loss or score."""


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """A model behind an OpenAI-compatible endpoint. The key is read from the environment (OPENAI_API_KEY)."""

    model: str | None = None
    """Name of the model, as the endpoint knows it."""
    base_url: str = "https://api.openai.com/v1"
    """Address of the endpoint."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of its replies."""
    max_tokens: PositiveInt = 256
    """Longest reply, in its tokens."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that a reply may take."""
    attempts: PositiveInt = 6
    """Attempts before a question counts as unanswered; the pauses between are the openai client's, or what the endpoint
    asks for."""
    requests_per_minute: NonNegativeFloat = 0.0
    """Most requests a minute of each process. 0: no limit."""
    parallel: PositiveInt = 4
    """Concurrent requests."""
    dollars_per_million_in: NonNegativeFloat = 0.0
    """Price of a million prompt tokens, to compute the cost."""
    dollars_per_million_out: NonNegativeFloat = 0.0
    """Price of a million reply tokens."""


@dataclass(frozen=True, kw_only=True)
class BilingualConfig:
    """The translator of the part `bilingual`, and the English prompts. Rows may have `question_en`, `context_en`."""

    path: str | None = None
    """Hugging Face directory of an encoder-decoder model for translation, or of a causal one."""
    instruction: str = "{text}"
    """What the model gets; a causal one needs words around {text} (`Faroese: {text}\\nEnglish:`), T5 a prefix."""
    source_language: str | None = None
    """Name of Faroese for tokenizers that ask for one (NLLB: fao_Latn)."""
    target_language: str | None = None
    """Name of English for models that begin with one (NLLB: eng_Latn)."""
    max_new_tokens: PositiveInt = 128
    """Longest translation, in its tokens."""
    batch: PositiveInt = 32
    """Texts translated at a time."""
    template: str = "Question: {question}\nAnswer:"
    """English prompt of a question; its context, if any, comes before it in a line `Text: ...`."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """From log-probabilities to token rewards (docs/algorithms.md)."""

    length_alpha: Finite = 1.0
    """teacher_logprob: the sum over a response is divided by T**alpha. 1: mean of a token, 0: plain sum."""
    length_normalize: bool = True
    """minillm: the long part is the mean of the rewards that follow, not their sum."""
    gamma: ClosedUnitInterval = 1.0
    """minillm: discount of the long part, in powers relative to the token."""
    teacher_weight: Finite = 1.0
    """Weight of `teacher` in the reward; each of `teachers` has its own."""
    similarity_weight: Finite = 0.0
    """Weight of an extra part: similarity 0..1 to the nearest of the data's answers. Needs answers in the prompts."""
    similarity_metric: Literal["rouge_l", "chrf", "bleu", "exact_match", "token_f1", "edit"] = "rouge_l"
    """How the similarity is measured (rewards/parts/similarity.py)."""
    language_weight: Finite = 0.0
    """Weight of an extra part: is the response Faroese, 0..1 (rewards/parts/language.py)."""
    language_dictionary: str | None = None
    """Also check words with a Hunspell dictionary, which counts for half of that part: `auto` for the installed Faroese
    one, or a path without .dic and .aff. None: no dictionary. Needs the package spylls."""
    format_weight: Finite = 0.0
    """Weight of an extra part: 1 if the response ended by itself and all of it matches `format_pattern`."""
    format_pattern: str = r"[^\n]*\S[^\n]*"
    """Regular expression for the whole response. Default: one line that is not blank."""
    length_weight: Finite = 0.0
    """Weight of an extra part: 1 for a response of a number of words in the range below, falling to 0 at no words and
    at twice the maximum."""
    length_min_words: PositiveInt = 1
    """Fewest words of that range."""
    length_max_words: int = 20
    """Most words of that range."""
    judge_weight: Finite = 0.0
    """Weight of an extra part: the rating 0..1 by a model behind an OpenAI-compatible endpoint (`judge`)."""
    bilingual_weight: Finite = 0.0
    """Weight of an extra part: the teacher's mean log-probability of a token (nats, at most 0) of the answer's English
    translation, under an English prompt (`bilingual`)."""
    custom: str | None = None
    """Your own function as an extra part, FILE.py:FUNCTION: from rewards.base.RewardInput to a number for each
    response, or for each token (docs/extending.md)."""
    custom_weight: Finite = 1.0
    """Weight of that part."""
    bilingual: BilingualConfig = field(default_factory=BilingualConfig)
    """The translator."""
    judge: ApiConfig = field(default_factory=ApiConfig)
    """The judge's endpoint."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Group-relative advantages (arXiv 2402.03300)."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a score is compared with: the mean of its group, or of the others in it (RLOO, arXiv 2402.14740)."""
    scale: Literal["group", "batch", "none"] = "group"
    """What centred scores are divided by: the standard deviation of the group, of the batch, or nothing."""
    epsilon: PositiveFloat = 1e-4
    """Added to the standard deviation."""
    no_signal: Literal["keep", "skip", "resample"] = "keep"
    """A group whose scores are all equal: keep it (it counts in the denominators), leave it out, or answer other
    prompts in its place (DAPO's dynamic sampling, arXiv 2503.14476)."""
    resample_rounds: PositiveInt = 2
    """Most rounds of such resampling in a step."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Generalised advantage estimation (arXiv 1506.02438) and PPO's extras."""

    gamma: ClosedUnitInterval = 1.0
    """Discount a token."""
    gae_lambda: ClosedUnitInterval = 0.95
    """Lambda of GAE."""
    kl_penalty: NonNegativeFloat = 0.02
    """Coefficient of -(log pi_b - log pi_ref) in the reward: fixed, or the initial value of the adaptive one."""
    kl_target: PositiveFloat | None = None
    """Target of the adaptive coefficient, in nats a token. None: the coefficient is fixed."""
    value_clip: PositiveFloat = 0.2
    """Values are clipped to this distance from their old ones in an update."""
    whiten: bool = True
    """Centre and scale the advantages over all tokens of the batch."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Schedule of a weight over the run: its value times a factor that goes from 1 to `final`."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Constant: the factor stays 1."""
    final: NonNegativeFloat = 0.0
    """Factor at the end."""
    steps: PositiveInt | None = None
    """RL steps until `final` is reached. None: all steps of the run."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """L = L_policy + beta L_KL + lambda_PT L_PT + lambda_BC L_BC + lambda_1 L_single.

    The critic's L_value has an engine and an optimizer of its own, so it needs no weight here."""

    clip_low: OpenUnitInterval = 0.2
    """Lower clip of the importance ratio: 1 - clip_low. In the first update on a batch that ratio is 1."""
    clip_high: PositiveFloat = 0.2
    """Upper clip of the importance ratio: 1 + clip_high."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens (DAPO), over tokens then responses (GRPO), or a sum over a constant length (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or of the whole sequence (GSPO)."""
    policy_coef: NonNegativeFloat = 1.0
    """Weight of L_policy."""
    kl_coef: NonNegativeFloat = 0.0
    """beta, weight of the KL to the reference in the loss."""
    kl_estimator: Literal["k2", "k3", "full"] = "k3"
    """That KL as a loss: from the sampled token (k2, k3), or exact over the vocabulary (full). k1 has no gradient in
    expectation as a loss; it is PPO's penalty in the reward."""
    importance_cap: AtLeastOne | None = None
    """Truncated importance weights between the training forward and what sampling recorded: min(pi_old/pi_b, cap).
    The ratio is then taken to the training forward's pi_old. None: the ratio is taken to pi_b directly."""
    pt_coef: NonNegativeFloat | None = None
    """lambda_PT, weight of the language-model loss on raw text. None: 0.1 with reward minillm, else 0."""
    pt_batch: PositiveInt = 8
    """L_PT sequences a step, over all ranks; and L_BC examples."""
    bc_coef: NonNegativeFloat = 0.0
    """lambda_BC, weight of behaviour cloning on the warm-up answers."""
    single_step_coef: NonNegativeFloat | None = None
    """lambda_1, weight of MiniLLM's exact single-step KL. None: 1 with minillm and equal tokenizers, else 0."""
    single_step_entries: NonNegativeInt = 0
    """L_single from the teacher's K likeliest entries and one bucket for the rest: a lower bound, which saves the
    product with the teacher's output layer but needs a second request. 0: exact, from its hidden states."""
    policy_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Schedule of policy_coef."""
    kl_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Schedule of kl_coef."""
    pt_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Schedule of pt_coef."""
    bc_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Schedule of bc_coef."""
    single_step_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Schedule of single_step_coef."""
    gradient_shares_every: NonNegativeInt = 0
    """Steps between measurements of each term's gradient norm (costs one more backward pass a term). 0: never."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The baselines (`--recipe`)."""

    answer_temperature: NonNegativeFloat = 0.0
    """Stage 1 from the teacher, seqkd, sampled_ce: temperature of the teacher's answers. 0: greedy."""
    sampled_tokens: PositiveInt = 256
    """sampled_ce: teacher tokens sampled at each position (Gemma 3, arXiv 2503.19786, section 3)."""
    jsd_beta: ClosedUnitInterval = 0.5
    """gkd: generalised Jensen-Shannon divergence (arXiv 2306.13649, eq. 1) from forward KL (0) to reverse KL (1)."""
    bond_forward: ClosedUnitInterval = 0.5
    """bond: weight of imitating the best of N (forward KL) against the quantile reward (backward KL), arXiv
    2407.14622."""
    warp_rate: ClosedUnitInterval = 0.5
    """warp: the exported student is interpolated between the start of the run (0) and its end (1) (arXiv 2406.16768,
    eq. 5)."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """Alternating phases: supervised steps on the warm-up answers between stretches of reinforcement learning."""

    every: NonNegativeInt = 0
    """RL steps between supervised phases. 0: none."""
    steps: PositiveInt = 10
    """Optimizer steps of a supervised phase."""
