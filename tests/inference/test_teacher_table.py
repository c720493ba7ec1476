"""Families as a teacher, by the backend that `auto` takes: the largest difference to transformers, or the refusal."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare

from configs.schema import TeacherConfig
from inference.attention.packing import Group
from inference.model.backend import BACKENDS, check_teacher
from inference.model.files import Checkpoint, end_ids, safetensors_files
from inference.model.output_layer import load_output_layer, logit_softcap
from inference.model.scoring import Scorer
from inference.model.weights import open_slice
from inference.protocol.wire import Request
from tests.support.model_zoo import make
from tests.support.teacher_models import _SIZES, VOCAB, build, reference_logits
from tests.support.teacher_ranks import GROUPS, PROMPTS, REQUESTS

SIZES = {**_SIZES, "intermediate_size": 64, "hidden_size": 64}
PLAIN: dict[str, Any] = {
    "granite": lambda: transformers.GraniteConfig(
        **SIZES, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.3, attention_multiplier=0.2
    ),
    "cohere": lambda: transformers.CohereConfig(**SIZES),
    "cohere2": lambda: transformers.Cohere2Config(**SIZES, sliding_window=5),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "minimax": lambda: transformers.MiniMaxConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4),
    "mamba": lambda: transformers.MambaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2),
}
MEGATRON = ("llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_multimodal", "gpt2")
LABELS = torch.tensor([token for group in GROUPS for response in group.responses for token in response])


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    family: str
    backend: str
    nats: float
    hidden: str
    """Largest difference of the whole distribution that a client makes of hidden states, or that there is none."""


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _saved(family: str, directory: Path) -> Any:
    if family in MEGATRON:
        return build(family, directory)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(PLAIN[family]()).eval().float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    model.save_pretrained(directory)
    return model


def row_of(family: str, directory: Path) -> Row:
    """Build the replica, serve it, compare."""
    model = _saved(family, directory)
    config = TeacherConfig(path=str(directory), tensor_parallel=1, max_batch_tokens=60, logit_chunk=8)
    name, _ = check_teacher(config)
    teacher: Any = BACKENDS[name].load(config, torch.device("cpu"))
    expected = torch.cat([reference_logits(model, g.prompt, r) for g in GROUPS for r in g.responses]).log_softmax(-1)
    (got,) = teacher.score(REQUESTS["score"])
    whole = "none"
    if hasattr(teacher, "hidden"):
        made, cap = teacher.hidden(REQUESTS["hidden"])[0] @ load_output_layer(directory).T, logit_softcap(directory)
        made = made if cap is None else cap * torch.tanh(made / cap)
        whole = f"{float((made.log_softmax(-1) - expected).abs().max()):.1e}"
    greedy = [int(t) for t in teacher.answer(REQUESTS["greedy"])[1]]
    assert greedy == [t for g in PROMPTS for t in _greedy(model, g.prompt)], family
    return Row(family, name, float((got - expected[torch.arange(len(LABELS)), LABELS]).abs().max()), whole)


@torch.no_grad()
def _greedy(model: Any, prompt: tuple[int, ...]) -> list[int]:
    ids = list(prompt)
    for _ in range(8):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", [*MEGATRON, *PLAIN])
def test_a_teacher_says_what_transformers_says(family: str, tmp_path: Path) -> None:
    row = row_of(family, tmp_path)
    print(row)
    assert row.backend == ("megatron" if family in MEGATRON else "transformers")
    assert row.nats < 1e-4
    assert row.hidden == "none" or float(row.hidden) < 1e-4


def test_a_stray_file_is_not_read_and_unread_tensors_are_refused(tmp_path: Path) -> None:
    _saved("llama", tmp_path)
    files = safetensors_files(tmp_path)
    save_file({"lm_head.weight": torch.zeros(VOCAB, 48)}, tmp_path / "zz_backup.safetensors")
    assert safetensors_files(tmp_path) == files
    config = TeacherConfig(path=str(tmp_path), tensor_parallel=1, backend="megatron")
    check_teacher(config)
    first = load_file(files[0])
    save_file({**first, "model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}, files[0])
    with pytest.raises(ValueError, match=r"would leave out: model\.layers\.0\.self_attn\.q_proj\.bias"):
        check_teacher(config)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in first.items()}, files[0])
    with pytest.raises(ValueError, match=r"packed numbers.*backend transformers"):
        check_teacher(config)
    save_file(first, files[0])
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"teacher\.path.*'awq'.*unquantised"):
        check_teacher(config)


BLOCK = (16, 32)
"""Rows and columns that share a factor; the matrices below are no multiples of it."""


def _in_float8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in float8, the factors of its blocks, and by hand, block after block, what the two stand for."""
    rows, columns = (-(-n // b) for n, b in zip(matrix.shape, BLOCK, strict=True))
    stored, meant = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn), torch.empty(matrix.shape)
    factors = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            block = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            factors[i, j] = matrix[block].abs().max() / 448
            stored[block] = (matrix[block] / factors[i, j]).to(torch.float8_e4m3fn)
            meant[block] = stored[block].float() * factors[i, j]
    return stored, factors, meant


def test_float8_weights_are_scaled_block_by_block(tmp_path: Path) -> None:
    model = build("qwen3", tmp_path)
    for file in safetensors_files(tmp_path):
        file.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name], tensors[name + "_scale_inv"], meant = _in_float8(tensors[name])
        assert (meant - model.state_dict()[name]).abs().max() > 1e-3  # what a reader that forgets the factors is off by
        model.state_dict()[name].copy_(meant)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    (tmp_path / "config.json").write_text(json.dumps(described))
    part = open_slice(Checkpoint(tmp_path), "model.layers.1.mlp.down_proj.weight")
    meant = model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(part[:], meant)
    assert torch.equal(part[7:33], meant[7:33])  # the part of a tensor-parallel rank
    assert torch.equal(part[:, 30:65], meant[:, 30:65])
    _same_as(model, tmp_path, "megatron")


def _same_as(model: Any, directory: Path, backend: str) -> Any:
    """The teacher in `directory`, which says what `model` says."""
    config = TeacherConfig(path=str(directory), tensor_parallel=1)
    assert check_teacher(config)[0] == backend
    teacher: Any = BACKENDS[backend].load(config, torch.device("cpu"))
    expected = torch.cat([reference_logits(model, g.prompt, r) for g in GROUPS for r in g.responses]).log_softmax(-1)
    (got,) = teacher.score(REQUESTS["score"])
    assert float((got - expected[torch.arange(len(LABELS)), LABELS]).abs().max()) < 1e-4
    made = teacher.hidden(REQUESTS["hidden"])[0] @ load_output_layer(directory).float().T
    assert float((made.log_softmax(-1) - expected).abs().max()) < 1e-4
    return teacher


@pytest.mark.parametrize("differs", [True, False])
def test_a_head_in_the_file_beside_tied_settings(differs: bool, tmp_path: Path) -> None:
    """config.json says tied, and the file holds an output layer: it counts where it differs, as in transformers."""
    build("llama3", tmp_path)
    for file in safetensors_files(tmp_path):
        first = load_file(file)
        if "model.embed_tokens.weight" in first:
            head = first["model.embed_tokens.weight"] + 0.05 * differs
            save_file({**first, "lm_head.weight": head}, file, metadata={"format": "pt"})
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            index["weight_map"]["lm_head.weight"] = file.name
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) != differs
    _same_as(model, tmp_path, "megatron")


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("family", "backend", "by_hand"),
    [
        ("llama", "megatron", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("qwen3", "transformers", {"rope_parameters": YARN}),
    ],
)
def test_settings_changed_by_hand_count_as_in_transformers(
    family: str, backend: str, by_hand: dict[str, Any], tmp_path: Path
) -> None:
    """Scaling in its older form replaces what is there; what Megatron cannot do keeps its hidden states under the other
    backend."""
    build(family, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **by_hand}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    _same_as(model, tmp_path, backend)


def _sampled(directory: Path, backend: Any, request: Request, most: int = 4096) -> list[torch.Tensor]:
    config = TeacherConfig(path=str(directory), tensor_parallel=1, backend=backend, max_batch_tokens=most)
    return BACKENDS[backend].load(config, torch.device("cpu")).answer(request)


def test_sampled_answers_of_both_backends_are_the_same(tmp_path: Path) -> None:
    """The same noise for the same seed, whatever the batch; so what holds of one backend's samples holds of both."""
    build("llama", tmp_path)
    request = replace(REQUESTS["sampled"], temperature=0.7)
    lengths, tokens = _sampled(tmp_path, "transformers", request)
    assert len(set(lengths.tolist())) > 1  # some end early, by a symbol of theirs
    for backend, most in (("transformers", 30), ("megatron", 4096), ("megatron", 30)):
        again = _sampled(tmp_path, backend, request, most)
        assert torch.equal(again[0], lengths)
        assert torch.equal(again[1], tokens)
    assert not torch.equal(_sampled(tmp_path, "transformers", replace(request, seed=8))[1], tokens)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_first_tokens_of_the_transformers_backend_have_the_models_distribution(family: str, tmp_path: Path) -> None:
    model, count = _saved(family, tmp_path), 2000
    prompts = tuple(Group(GROUPS[0].prompt, (), n) for n in range(count))
    request = Request("answer", prompts, 0.8, max_new_tokens=1, seed=3)
    tokens = _sampled(tmp_path, "transformers", request)[1]
    expected = (reference_logits(model, GROUPS[0].prompt, (0,))[0].double() / 0.8).softmax(-1)
    kept = expected > expected.median()  # the rest together
    seen = torch.bincount(tokens, minlength=VOCAB).double()
    bins = [torch.cat([x[kept], x[~kept].sum()[None]]).double() for x in (seen, expected * count)]
    assert chisquare(*bins).pvalue > 1e-3


def test_hidden_states_go_to_the_host_where_the_reply_is_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the largest reply, and every rank has the same."""
    scorer = Scorer.__new__(Scorer)
    teacher = SimpleNamespace(device=torch.device("cpu"), forward=lambda tokens, *_: torch.ones(len(tokens), 4))
    vars(scorer).update(teacher=teacher, max_batch_tokens=10)
    for rank, shapes in ((0, [(sum(len(r) for g in GROUPS for r in g.responses), 4)]), (1, [])):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert [tuple(tensor.shape) for tensor in scorer.hidden(REQUESTS["hidden"])] == shapes


def test_end_symbols_are_those_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    assert end_ids(tmp_path) == (1, 106)


def test_a_model_that_looks_ahead_is_no_teacher(tmp_path: Path) -> None:
    """transformers makes causal language models of BERT's kind; each token would be scored by a model that saw it."""
    model = make("bert")
    with torch.no_grad():
        model.cls.predictions.transform.LayerNorm.weight.mul_(0.3)  # what follows moves nothing far
    model.save_pretrained(tmp_path / "bert")
    config = TeacherConfig(path=str(tmp_path / "bert"), tensor_parallel=1, backend="transformers")
    with pytest.raises(ValueError, match=r"^teacher\.path = .*BertLMHeadModel looks at what follows"):
        BACKENDS["transformers"].load(config, torch.device("cpu"))
    make("llama4_text").save_pretrained(tmp_path / "llama4")  # whose class names its backbone wrong
    teacher: Any = BACKENDS["transformers"].load(replace(config, path=str(tmp_path / "llama4")), torch.device("cpu"))
    assert teacher.plain_head


def test_states_of_another_width_than_the_models_are_not_served(tmp_path: Path) -> None:
    """OPT-350M's output layer is on projected states: a client would ask for hidden_size numbers a token."""
    config = transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=2, do_layer_norm_before=False,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    config = TeacherConfig(path=str(tmp_path), tensor_parallel=1)
    assert not hasattr(BACKENDS["transformers"].load(config, torch.device("cpu")), "hidden")
