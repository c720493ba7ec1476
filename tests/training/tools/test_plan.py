"""`--plan` against measured memory of real trainers, against hand-counted sizes, and as a command."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, models

from configs.checks import validate
from configs.schema import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    RunConfig,
    SamplingConfig,
    StudentConfig,
    TeacherConfig,
)
from inference.model.families import parse_architecture
from tests.support.plan_teacher_worker import GROUPS, MAX_BATCH_TOKENS
from tests.support.plan_worker import PROMPT
from tests.support.runs import ROOT, free_port
from tests.support.teacher_models import build
from training.main import main
from training.run.cli import load_config
from training.tools.plan_rank import ModelFacts, Tracer, alternatives, parameters_of, rank_memory
from training.tools.plan_teacher import shard_weights, teacher_memory
from training.tools.plan_trace import meta_policy
from training.tools.plan_zero import BUCKET, EngineSettings, Parameters, engine_state

WITHIN = 0.15
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Each tensor has a mapping of its own, and what is freed leaves the process at once."""
TRAINERS: dict[int, dict[str, tuple[str, int, str, bool]]] = {
    1: {
        "ZeRO 0, float32": ("grpo", 0, "float32", False),
        "PPO, ZeRO 1, bfloat16, checkpointing": ("ppo", 1, "bfloat16", True),
    },
    2: {
        "PPO, ZeRO 1, float32, checkpointing": ("ppo", 1, "float32", True),
        "ZeRO 2, bfloat16": ("grpo", 2, "bfloat16", False),
        "ZeRO 3, float32": ("grpo", 3, "float32", False),
        "PPO, ZeRO 3, bfloat16": ("ppo", 3, "bfloat16", False),
        "ZeRO 0, bfloat16": ("grpo", 0, "bfloat16", False),
    },
}
"""Ranks -> what is measured: (algorithm, ZeRO stage of actor and critic, type, gradient checkpointing)."""


def save_model(directory: Path, **shape: int) -> Path:
    """A random Llama with a tokenizer that has one word for each entry."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=6000, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512, eos_token_id=2,
        bos_token_id=1, **shape,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(directory)
    return directory


def write_config(path: Path, model: Path, kind: tuple[str, int, str, bool], world: int) -> Path:
    """A run with two packed rows of one group on each rank, a reference, and no teacher in the trainer."""
    algo, stage, dtype, checkpointing = kind
    values = {
        "algo": algo, "reward": "teacher_logprob", "prompts_per_step": 2 * world,
        "student": {"path": str(model), "dtype": dtype, "gradient_checkpointing": checkpointing},
        "teacher": {"path": str(model)}, "data": {"max_prompt_tokens": PROMPT},
        "sampling": {"group_size": 6, "max_new_tokens": 32},
        "actor": {"zero_stage": stage, "micro_batch_tokens": 300}, "critic": {"zero_stage": stage},
        "loss": {"kl_coef": 0.01},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[tuple[RunConfig, dict[str, int]]]]:
    """Ranks -> each trainer's configuration with what its rank 0 measured."""
    root = tmp_path_factory.mktemp("plan")
    model = save_model(root / "model", hidden_size=448, intermediate_size=1216, num_hidden_layers=7)
    tiny = save_model(root / "tiny", hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    found = {}
    for world, kinds in TRAINERS.items():
        paths = [write_config(root / f"{world}-{i}.yaml", model, kind, world) for i, kind in enumerate(kinds.values())]
        first = write_config(root / f"{world}-tiny.yaml", tiny, ("ppo", 3, "bfloat16", True), world)
        lines = run_ranks(world, [first, *paths])
        found[world] = [(load_config(p), json.loads(line)) for p, line in zip(paths, lines, strict=True)]
    return found


def run_ranks(world: int, paths: list[Path]) -> list[str]:
    """Start the ranks of tests/support/plan_worker.py; the JSON lines of rank 0."""
    shared = {**os.environ, **EXACT_MEMORY, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "plan_worker.py"), *map(str, paths)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=900) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outputs[0][1][-3000:]
    return [line for line in outputs[0][0].splitlines() if line.startswith("{")]


@functools.cache
def tracer_of(student: StudentConfig) -> Tracer:
    """The plan's view of a trainer without a teacher's output layer."""
    config = transformers.AutoConfig.from_pretrained(student.path)
    facts = ModelFacts(config, parse_architecture(config.to_dict()), False, PROMPT)
    return Tracer(facts, student)


def planned(config: RunConfig, world: int) -> dict[str, int]:
    """What the plan says of what was measured."""
    tracer = tracer_of(config.student)
    rank = rank_memory(config, tracer, world, "cpu")
    static = sum(rank.static.values())
    said = {"static": static, "actor_update": rank.moments["update"]}
    if config.algo == "ppo":
        said["critic_update"] = rank.moments["critic's update"]
    said["total"] = static + max(said["actor_update"], said.get("critic_update", 0))
    return said


@pytest.mark.parametrize("world", TRAINERS)
def test_plan_is_within_15_percent_of_measured_memory(
    world: int, measured: dict[int, list[tuple[RunConfig, dict[str, int]]]], record_property: Any
) -> None:
    wrong = []
    for name, (config, was) in zip(TRAINERS[world], measured[world], strict=True):
        said = planned(config, world)
        was["total"] = was["static"] + max(was["actor_update"], was.get("critic_update", 0))
        for part in ("static", "actor_update", "critic_update", "total"):
            if part in said:
                off = said[part] / was[part] - 1
                line = f"{name}, {part}: {said[part] / 1e6:.1f} MB planned, {was[part] / 1e6:.1f} measured, {off:+.1%}"
                print(line)
                record_property(f"{world} {name} {part}", off)
                if abs(off) > WITHIN:
                    wrong.append(line)
    assert not wrong, "\n".join(wrong)


TEACHERS = ("llama", "gemma3", "gpt2")


@pytest.fixture(scope="module")
def measured_teachers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, int]]]:
    """A tiny teacher of each kind of layout and one of a few million parameters, on two ranks."""
    root = tmp_path_factory.mktemp("teachers")
    for kind in TEACHERS:
        build(kind, root / kind)
    large = save_model(root / "large", hidden_size=448, intermediate_size=1216, num_hidden_layers=2)
    directories = [*(root / kind for kind in TEACHERS), large]
    shared = {**os.environ, **EXACT_MEMORY, "OMP_NUM_THREADS": "1"}
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "plan_teacher_worker.py"), str(rank), "2", port,
             str(PROMPT), "6", "32", *map(str, directories)],
            env=shared, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=900) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outputs[0][1][-3000:]
    lines = [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("{")]
    return list(zip(directories, lines, strict=True))


def test_teacher_shards_are_exact(measured_teachers: list[tuple[Path, dict[str, int]]]) -> None:
    for directory, was in measured_teachers:
        architecture = parse_architecture(json.loads((directory / "config.json").read_text()))
        assert shard_weights(architecture, 2, 4) == was["shard"], directory.name


def test_teacher_scoring_is_within_15_percent(measured_teachers: list[tuple[Path, dict[str, int]]]) -> None:
    directory, was = measured_teachers[-1]
    architecture = parse_architecture(json.loads((directory / "config.json").read_text()))
    config = RunConfig(
        prompts_per_step=GROUPS,
        sampling=SamplingConfig(group_size=6, max_new_tokens=32),
        teacher=TeacherConfig(max_batch_tokens=MAX_BATCH_TOKENS, logit_chunk=256),
    )
    said = teacher_memory(architecture, config, 2, PROMPT)
    peak = max(said.activations, said.logits)
    print(f"teacher scoring: {peak / 1e6:.1f} MB planned, {was['peak'] / 1e6:.1f} measured")
    assert abs(peak / was["peak"] - 1) < WITHIN


LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
PUBLIC: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA,
    "llama-2-70b": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "num_key_value_heads": 8},
    "mistral-7b": {**LLAMA, "model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8,
                   "max_position_embeddings": 32768, "sliding_window": 4096},
    "gemma-3-27b": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168,
            "sliding_window": 1024, "vocab_size": 262208, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27,
                          "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 896, "patch_size": 14},
    },
    "small": {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 4},
    "gpt-sw3-6.7b": {"model_type": "gpt2", "vocab_size": 64000, "n_embd": 4096, "n_layer": 32, "n_head": 32,
                     "n_inner": 16384, "n_positions": 2048, "activation_function": "gelu"},
}  # fmt: skip
"""The numbers of the published config.json, and a small student."""
SHORT = ["--data.max_prompt_tokens", "256", "--sampling.max_new_tokens", "8", "--sampling.group_size", "4",
         "--actor.micro_batch_tokens", "512"]  # fmt: skip
"""Rows that are traced in little time; what is asserted of a pair does not depend on them."""


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories that hold a config.json and nothing else."""
    root = tmp_path_factory.mktemp("public")
    for name, values in PUBLIC.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(values))
    return root


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-2-70b", 68_976_648_192), ("mistral-7b", 7_241_732_096)],
)
def test_published_parameter_counts(name: str, parameters: int, public: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(public / name)
    assert parameters_of(meta_policy(config, StudentConfig(dtype="bfloat16"))).total == parameters
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert shard_weights(parse_architecture(config.to_dict()), 1, 2) == 2 * parameters + 2 * norms  # norms: float32


def test_engine_state_by_hand() -> None:
    """One billion parameters, eight ranks: the sizes of the ZeRO paper (arXiv 1910.02054, figure 1), and buffers."""
    size, billion = Parameters(10**9, 10**9, 10**8, 0, element=2), 10**9

    def state(stage: int, world: int = 8, offload: bool = False) -> tuple[dict[str, int], int]:
        return engine_state(size, EngineSettings(stage, world, offload, "cuda"))

    assert state(0) == ({"parameters": 2 * billion, "optimizer": 12 * billion}, 0)
    assert (state(1)[0]["parameters"], state(1)[0]["optimizer"]) == (2 * billion, 1.5 * billion)
    assert state(3)[0] == {
        "parameters": billion / 4, "optimizer": 1.5 * billion, "gradients": billion / 4,
        "communication buffers": 2 * BUCKET,
    }  # fmt: skip
    held, host = state(3, offload=True)
    assert "optimizer" not in held
    assert host == (12 + 4 + 2) * billion / 8
    plain, _ = engine_state(Parameters(10**9, 10**9, 10**8, 0, element=4), EngineSettings(0, 8, False, "cuda"))
    assert plain == {"parameters": 4 * billion, "optimizer": 8 * billion}


def test_only_an_adapter_is_trained(public: Path) -> None:
    shape = transformers.AutoConfig.from_pretrained(public / "llama-2-7b")
    policy = meta_policy(
        shape, StudentConfig(dtype="bfloat16", adapter=AdapterConfig(rank=4, targets="q_proj,v_proj")), layers=2
    )
    assert parameters_of(policy).trainable == 2 * 2 * 4 * (4096 + 4096)  # layers, matrices, rank, both sides


def test_a_graph_of_the_decoding_step_is_counted() -> None:
    """Beside a step as it is: logits of 3 prompts' 4 responses, their log-probabilities, and what a layer makes."""
    shape = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    tracer = Tracer(ModelFacts(shape, shape, same_tokenizer=False, prompt_tokens=16), StudentConfig(dtype="float32"))
    sampling = SamplingConfig(group_size=4, max_new_tokens=8)
    without, captured = (tracer.sampling(sampling, 3, graph) for graph in (False, True))
    logits = 3 * 4 * shape.vocab_size * 4
    assert 2 * logits <= captured - without < without


def test_a_recipe_is_planned_as_it_runs() -> None:
    """GKD's divergence is over the vocabulary with any reward, and a recipe without a policy gradient has neither
    critic nor reference."""
    shape = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    tracer = Tracer(ModelFacts(shape, shape, same_tokenizer=True, prompt_tokens=16), StudentConfig(dtype="float32"))
    rl = RunConfig(
        algo="ppo", reward="teacher_logprob", sampling=SamplingConfig(group_size=2, max_new_tokens=8),
        data=DataConfig(text=None), eval=EvalConfig(batch=2),
    )  # fmt: skip
    of_rl, of_gkd = (rank_memory(replace(rl, recipe=recipe), tracer, 1) for recipe in ("rl", "gkd"))
    assert of_gkd.moments["update"] > of_rl.moments["update"]
    assert {"reference", "critic: parameters"} < of_rl.static.keys()
    assert not any(name.startswith(("reference", "critic")) for name in of_gkd.static)


def test_what_a_plan_proposes_is_not_refused() -> None:
    """Gradients of single terms cannot be measured at stage 3."""
    config = replace(RunConfig(), loss=LossConfig(gradient_shares_every=5))
    for _, proposed in alternatives(config, offload=False):
        validate(proposed)


@pytest.mark.parametrize(
    ("config", "student", "teacher", "equal", "rows"),
    [
        pytest.param("gemma3_27b_mistral_7b", "mistral-7b", "gemma-3-27b", False, [], marks=pytest.mark.slow),
        ("llama2_70b_llama2_7b", "llama-2-7b", "llama-2-70b", True, SHORT),
        ("gemma3_27b_gptsw3_6_7b", "gpt-sw3-6.7b", "gemma-3-27b", False, SHORT),
    ],
)
def test_real_pairs_from_config_json_alone(
    config: str, student: str, teacher: str, equal: bool, rows: list[str], public: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    paths = ["--student.path", str(public / student), "--teacher.path", str(public / teacher)]
    assert main(["--plan", "--config", str(ROOT / "configs" / f"{config}.yaml"), *paths, *rows]) == 0
    page = capsys.readouterr().out
    assert f"taken as {'equal' if equal else 'different'}" in page
    assert ("teacher's output layer" in page) is equal
    cards = [line.split() for line in page.splitlines() if " GB, " in line]
    assert [(c[0], c[2]) for c in cards] == [(n, a) for n in ("40", "80", "141") for a in ("GRPO", "PPO")]
    grpo, ppo = (int(cards[i][3]) for i in (4, 5))
    assert 1 <= grpo <= ppo, "PPO has the critic besides"


def test_every_teacher_is_planned_and_one_that_transformers_runs_says_so(
    public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BLOOM-7B1 has 7,069,016,064 parameters (its model card), 2 bytes each."""
    (tmp_path / "bloom").mkdir()
    shape = {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32}
    (tmp_path / "bloom" / "config.json").write_text(json.dumps(shape))
    config = {
        "student": {"path": str(public / "small")},
        "teacher": {"path": str(tmp_path / "bloom"), "dtype": "bfloat16"},
        "teachers": [{"name": "big", "path": str(public / "llama-2-70b"), "dtype": "bfloat16"}],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["--plan", "--config", str(tmp_path / "run.yaml"), *SHORT]) == 0
    page = capsys.readouterr().out
    assert "teacher: transformers runs it (bloom, bfloat16), in one process: 14.14 GB of weights" in page
    assert "One rank of teachers[0] by tensor-parallel size (llama, bfloat16), GB" in page
    assert "for its weights alone; the 1 in teachers come on top" in page
    cards = [line.split() for line in page.splitlines() if " GB, " in line and "GRPO" in line]
    assert [row[4] for row in cards] == ["1", "1", "1"]
    config["teachers"][0]["path"] = str(tmp_path / "nothing")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["--plan", "--config", str(tmp_path / "run.yaml"), *SHORT])
    assert capsys.readouterr().err.startswith("error: teachers[0].path = ")


def test_mistakes_are_one_message(public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ["--teacher.path", str(public / "llama-2-70b")]
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 100}))
    for path, mend in (
        ("nobody/nothing", "no such directory, not in the hub's cache"),
        (str(tmp_path), "no config.json"),
        ("/no/such", "no such directory"),
        (str(tmp_path / "t5"), "model_type = 't5' is no causal language model"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["--plan", "--student.path", path, *teacher])
        assert ended.value.code == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith(f"error: student.path = {path!r}: ")
        assert mend in message
        assert len(message.splitlines()) == 1


def test_doctor_takes_the_place_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RunConfig] = []
    room = types.ModuleType("training.tools.doctor")
    room.doctor = lambda config: asked.append(config) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "training.tools.doctor", room)
    assert main(["--doctor", "--steps", "3"]) == 7
    assert asked[0].steps == 3
