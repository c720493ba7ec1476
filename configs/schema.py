"""What a run is: every setting, typed, with its unit and its default.

No torch, no model code. Values come from these defaults, then from a YAML file, then from the command line;
`training/main.py --help all` prints these pages (configs/models.py: the models; configs/learning.py: how they learn).
Checks that need only the values are in configs/checks.py; checks that read files are in `training/data/preflight.py`. A
check never changes a value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from configs.learning import (
    ActorConfig,
    DistillConfig,
    GRPOConfig,
    LossConfig,
    PhaseConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    ScheduleConfig,  # noqa: F401
)
from configs.models import (
    DEMO,
    AdapterConfig,  # noqa: F401
    CriticConfig,
    ExtraTeacherConfig,
    ReferenceConfig,
    StudentConfig,
    TeacherConfig,
)
from configs.ranges import AtLeastTwo, NonNegativeInt, PositiveFinite, PositiveFloat, PositiveInt, Seed


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts, held-out questions and raw text.

    Each is a file, a folder or a data set of the hub (`owner/name:split`), in a layout of docs/data.md."""

    prompts: str = DEMO
    """Questions for stage 2 (their answers are not used), or `demo`."""
    warmup: str = DEMO
    """Questions with answers for stage 1, or `demo`."""
    heldout: str = DEMO
    """Held-out questions with answers, or `demo`."""
    open: str | None = None
    """Open questions for the evaluation: each row has a `pattern`, a regular expression that matches the whole of a
    right answer; or `demo`. None: no open questions."""
    validation: str | None = None
    """Questions for the validation during training (eval.every). None: some RL prompts are set aside."""
    text: str | None = DEMO
    """Rows with a `text`, for L_PT; `demo`; or None."""
    template: str = "Spurningur: {question}\nSvar:"
    """How a question becomes a prompt; its context, if any, comes before it in a line `Tekstur: ...`."""
    max_prompt_tokens: AtLeastTwo = 512
    """Longer prompts are counted and skipped."""
    text_block_tokens: AtLeastTwo = 64
    """Tokens in one L_PT sequence."""
    text_packing: Literal["blocks", "documents"] = "blocks"
    """L_PT: texts are concatenated into blocks. A text attends to those before it in its block (blocks), or only to
    itself (documents). Both predict the same tokens, without padding."""
    deduplicate: bool = False
    """Leave out repeated raw texts (ignoring case and white space). They are counted in any case."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The held-out evaluation before and after."""

    questions: PositiveInt | None = None
    """Held-out questions asked. None: all."""
    batch: PositiveInt = 64
    """Questions answered at a time."""
    kl_samples: PositiveInt = 1
    """Sampled answers per question, for the reverse KL to the teacher and the share of right open answers."""
    baseline: str | None = None
    """A baseline that is evaluated on the same questions at the end: the directory of a model with the student's shape,
    or `demo`. None: no baseline."""
    minimal_pairs: NonNegativeInt = 0
    """Pairs of a right sentence and one with a mistake on which teacher and student are compared before stage 2, with a
    warning if the teacher is no better. 0: none."""
    every: NonNegativeInt = 0
    """Steps between validations during training, on other questions than the held-out ones. 0: none."""
    validation_questions: PositiveInt = 64
    """Questions of a validation: set aside from the RL prompts, or the first ones of data.validation."""
    metric: Literal["f1", "exact_match", "reverse_kl"] = "f1"
    """By what the best checkpoint is chosen: F1 or exact match (higher), or reverse KL to the teacher (lower)."""
    patience: NonNegativeInt = 0
    """End the run after so many validations in a row without a better one. 0: never."""
    export: Literal["last", "best"] = "last"
    """Which student is exported and evaluated at the end: of the last step, or of the best validation."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Stage 1: supervised warm-up."""

    steps: PositiveInt = 100
    """Optimizer steps."""
    batch: PositiveInt = 32
    """Examples per step, over all ranks."""
    learning_rate: PositiveFinite = 1e-5
    """Peak learning rate; the rest of the optimizer is the actor's."""
    answers: Literal["data", "teacher"] = "data"
    """Train on the answers in data.warmup, or on the teacher's answers to data.prompts (from its server, cached)."""
    samples: PositiveInt = 1
    """The teacher's answers to each prompt, at distill.answer_temperature."""
    output: str | None = None
    """Directory of the trained model. None: runs/NAME/export."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: PositiveInt = 50
    """Steps between checkpoints. One more is written at the end."""
    keep: PositiveInt = 2
    """Checkpoints that are kept, in addition to the best."""
    asynchronous: bool = False
    """Write in the background, from a copy of the states in host memory, while training continues."""
    on_error: Literal["stop", "continue"] = "stop"
    """If a checkpoint cannot be written (full disk): end the run with the reason, or warn and continue without it.
    Earlier checkpoints stay intact in both cases."""
    samples_every: PositiveInt = 10
    """Steps between entries in samples.jsonl."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Sharing the student."""

    push_to_hub: str | None = None
    """Hub repository (owner/name) to which the finished export is uploaded; created as private if it does not exist."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `--algo` and `--reward` choose one of the four approaches."""

    algo: str = "grpo"
    """Advantage estimator, a row of training/algorithms.py: group baseline (grpo) or critic (ppo)."""
    reward: str = "minillm"
    """Reward of a response, a row of rewards/__init__.py: the teacher's log-likelihood (teacher_logprob), or MiniLLM's
    reverse-KL reward (minillm)."""
    recipe: str = "rl"
    """How the student learns: reinforcement learning (rl; warp: with averaged weights), or a baseline: supervised on
    the teacher's answers (seqkd), cross-entropy on sampled teacher tokens of these answers (sampled_ce), divergence to
    the teacher on the student's own answers (gkd), best of N (bond). See docs/algorithms.md."""
    name: str | None = None
    """Name of the run's folder. None: ALGO-REWARD, -RECIPE where it is not rl, and -seedSEED where it is not 0."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    cache_dir: str = "runs/cache"
    """Folder of what can be recomputed: demo models, teacher answers."""
    demo_size: Literal["demo", "small", "tiny"] = "demo"
    """Size of the built-in demo's models; `small` has a smaller student, `tiny` is for tests and learns little."""
    seed: Seed = 0
    """Seed of sampling, data order and new weights."""
    steps: PositiveInt = 100
    """Steps of stage 2. Stages 0 and 1 take sft.steps."""
    prompts_per_step: PositiveInt = 16
    """N: prompts per step of stage 2, over all ranks. Stages 0 and 1 take sft.batch."""
    report_to: str = "tensorboard"
    """Where each step's metrics are logged in addition to metrics.jsonl: tensorboard, wandb, mlflow, separated by
    commas; or none."""
    threads: PositiveInt | None = None
    """CPU threads of each trainer process. None: the cores, divided among the trainer's ranks on the machine."""
    time_limit_s: PositiveFloat | None = None
    """Seconds that one start of the run may take: it writes a checkpoint in time and exits with 75. The end of a SLURM
    job is respected as well. None: no other limit."""
    stuck_timeout_s: float = 900.0
    """End the run after so many seconds without progress on any rank, and name the rank that hangs. Must be longer than
    teacher.timeout_s and than a checkpoint takes."""
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: tuple[ExtraTeacherConfig, ...] = ()
    """More teachers, whose weighted rewards are added. A list in YAML; each needs `name` and `path`."""
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    phases: PhaseConfig = field(default_factory=PhaseConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        recipe = "" if self.recipe == "rl" else f"-{self.recipe}"
        return self.name or f"{self.algo}-{self.reward}{recipe}" + (f"-seed{self.seed}" if self.seed else "")

    @property
    def every_teacher(self) -> dict[str, TeacherConfig]:
        """All teachers by the keys of their settings: teacher, teachers[0], ..."""
        return {"teacher": self.teacher, **{f"teachers[{i}]": one for i, one in enumerate(self.teachers)}}


def as_dict(config: RunConfig) -> dict[str, object]:
    """Plain nested values, ready for YAML."""
    values = dataclasses.asdict(config)
    values["teachers"] = list(values["teachers"])
    return values


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted keys; those of a list of teachers with their place, `teachers[0].path`. An empty list or
    mapping has none: beside the settings of one that is not empty it would be a setting that differs."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            for place, one in enumerate(value):
                found |= flat(one, f"{prefix}{key}[{place}].")
        else:
            found[f"{prefix}{key}"] = value
    return found


def check_sections(values: Any, known: Mapping[str, Any], prefix: str = "") -> None:
    """Raises ValueError where settings, as a YAML file has them, have a section with nothing below it, or no settings.
    `known`: the sections that there are, as `as_dict` has them."""
    for key, value in values.items() if isinstance(values, Mapping) else ():
        below = known.get(key)
        if isinstance(below, Mapping | list) and value is None:
            raise ValueError(f"{prefix}{key}: nothing stands below it; give it a setting, or leave it out")
        if isinstance(below, Mapping) and not isinstance(value, Mapping | str):
            raise ValueError(f"{prefix}{key} = {value!r}: write its settings below it, each as KEY: VALUE")
        if isinstance(below, Mapping):
            check_sections(value, below, f"{prefix}{key}.")
