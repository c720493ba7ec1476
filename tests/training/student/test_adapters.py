"""Adapters: zero at the start, off is the start, merged on export, whatever the student was trained from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from configs.schema import AdapterConfig
from inference.attention.packing import groups_of, pack_row
from tests.support.model_zoo import make
from tests.support.runs import metrics
from tests.support.student_models import build, plain_logprobs, save
from training.data.preflight import context_length
from training.student.adapters import adapter_off, adapter_parameters, plain_parameters, save_adapter, save_plain
from training.student.export import interpolate
from training.student.loading import load_policy
from training.student.policy import Policy

PROMPTS, RESPONSES = [(3, 4, 5), (6, 7)], [(8, 9, 2), (10,), (), (11, 12, 13)]
ROW = pack_row(groups_of(PROMPTS, RESPONSES, 2))


def whole(parameters: Any) -> Any:
    return nullcontext()


def moved(policy: Policy) -> Policy:
    """As if it had been trained: an adapter that changes something."""
    stream = torch.Generator().manual_seed(5)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=stream)
    return policy


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_off_is_the_start_and_merged_is_the_adapted_student(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / "start")
    start = load_policy(tmp_path / "start", "float32").eval()
    policy = load_policy(tmp_path / "start", "float32", adapter=AdapterConfig(rank=4, alpha=8)).eval()
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        before = start(ROW).logprobs_S
        torch.testing.assert_close(policy(ROW).logprobs_S, before, atol=0, rtol=0)  # it starts at zero
        moved(policy)
        after = policy(ROW).logprobs_S
        assert float((after - before).abs().max()) > 0.01
        with adapter_off(policy.model):
            torch.testing.assert_close(policy(ROW).logprobs_S, before, atol=0, rtol=0)
        torch.testing.assert_close(policy(ROW).logprobs_S, after, atol=0, rtol=0)
        state = {name: value.clone() for name, value in plain_parameters(policy.model, whole)}
        assert state.keys() == dict(start.model.named_parameters()).keys()
        policy.model.config._attn_implementation = None
        save_plain(policy.model, state, tmp_path / "export")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
        plain = torch.cat([plain_logprobs(merged, PROMPTS[b // 2], r) for b, r in enumerate(RESPONSES) if r])
        adapter = {name: value.clone() for name, value in adapter_parameters(policy.model, whole)}
        save_adapter(policy.model, adapter, str(tmp_path / "start"), tmp_path / "adapter")
        opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()  # on its base, by peft alone
        beside = torch.cat([plain_logprobs(opened, PROMPTS[b // 2], r) for b, r in enumerate(RESPONSES) if r])
    torch.testing.assert_close(plain, after, atol=2e-5, rtol=0)
    torch.testing.assert_close(beside, after, atol=2e-5, rtol=0)


def test_an_adapted_student_gives_its_place_to_another_whole(tmp_path: Path) -> None:
    """`eval.baseline`: matrices under an adapter are the other's too, and half-way back is half of the adapter."""
    for seed, name in enumerate(("start", "other")):
        save("llama", tmp_path / name, seed)
    policy = moved(load_policy(tmp_path / "start", "float32", adapter=AdapterConfig(rank=4))).eval()
    actor: Any = SimpleNamespace(
        policy=policy, dtype="float32", engine=SimpleNamespace(gathered=lambda parameters, write: nullcontext())
    )
    with torch.no_grad():
        name = "model.layers.0.mlp.up_proj.weight"
        start = dict(load_policy(tmp_path / "start", "float32").model.named_parameters())[name]
        end = dict(plain_parameters(policy.model, whole))[name].clone()
        interpolate(actor, tmp_path / "start", 0.5)
        torch.testing.assert_close(dict(plain_parameters(policy.model, whole))[name], 0.5 * (start + end))
        interpolate(actor, tmp_path / "other", 0.0)
        expected = load_policy(tmp_path / "other", "float32").eval()(ROW).logprobs_S
        torch.testing.assert_close(policy(ROW).logprobs_S, expected, atol=1e-5, rtol=0)


def test_trap_24_sft_in_an_adapter_is_merged_before_ours_so_off_is_the_sft_student(tmp_path: Path) -> None:

    save("llama", tmp_path / "base")
    sft = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    stream = torch.Generator().manual_seed(1)
    for name, parameter in sft.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=stream)
    sft.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    sft.save_pretrained(tmp_path / "sft")
    policy = moved(load_policy(tmp_path / "sft", "float32", adapter=AdapterConfig(rank=4))).eval()
    with torch.no_grad():
        expected = torch.cat([plain_logprobs(sft.eval(), PROMPTS[b // 2], r) for b, r in enumerate(RESPONSES) if r])
        bare = torch.cat([plain_logprobs(build("llama"), PROMPTS[b // 2], r) for b, r in enumerate(RESPONSES) if r])
        with adapter_off(policy.model):
            reference = policy(ROW).logprobs_S
    torch.testing.assert_close(reference, expected, atol=1e-5, rtol=0)
    assert float((reference - bare).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"), "tied to the embedding"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "merge_and_unload"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(adapter: Any, why: str, tmp_path: Path) -> None:
    """One of a tied output layer would be merged into the embedding too: another model, by several nats a token."""
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, adapter)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"^student\.path = .*: the adapter cannot be merged .*{why}"):
        load_policy(tmp_path / "adapter", "float32")


def test_four_bit_weights_are_frozen_and_merge_into_plain_ones(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, initializer_range=0.1, **sizes)).eval()
    plain.save_pretrained(tmp_path)
    policy = moved(load_policy(tmp_path, "float32", adapter=AdapterConfig(rank=4, four_bit=True))).train()
    assert any(p.dtype == torch.uint8 for p in policy.parameters())
    logprobs_S = policy(ROW).logprobs_S
    logprobs_S.sum().backward()
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == {
        name for name, _ in policy.named_parameters() if "lora_" in name
    }
    state = {name: value.clone() for name, value in plain_parameters(policy.model, whole)}
    assert state.keys() == dict(plain.named_parameters()).keys()
    assert not torch.equal(state["model.layers.0.mlp.up_proj.weight"], plain.model.layers[0].mlp.up_proj.weight)
    plain.load_state_dict(state, strict=False)
    expected = torch.cat([plain_logprobs(plain, PROMPTS[b // 2], r) for b, r in enumerate(RESPONSES) if r])
    torch.testing.assert_close(logprobs_S, expected, atol=1e-4, rtol=0)


def test_a_target_that_no_module_has_is_named(tmp_path: Path) -> None:
    save("llama", tmp_path)
    with pytest.raises(ValueError, match=r"student.adapter.targets = 'wq'"):
        load_policy(tmp_path, "float32", adapter=AdapterConfig(rank=4, targets="wq"))
    with pytest.raises(ValueError, match=r"student.adapter.targets = .*no matrix in it is called 'v_prj'"):
        load_policy(tmp_path, "float32", adapter=AdapterConfig(rank=4, targets="q_proj,v_prj"))
    policy = load_policy(tmp_path, "float32", adapter=AdapterConfig(rank=4, targets="q_proj, v_proj"))
    adapted = {name.split(".")[-4] for name, p in policy.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize("targets", ["lm_head,q_proj", "embed_tokens,q_proj"])
def test_what_is_tied_to_the_embedding_gets_no_adapter(targets: str, tmp_path: Path) -> None:
    """Its update would be in the head and not in the export, or the export would fail after the last step."""
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"student.adapter.targets = '.*is the embedding, or the output layer"):
        load_policy(tmp_path, "float32", adapter=AdapterConfig(rank=2, targets=targets))


@pytest.mark.parametrize(
    ("family", "refused"), [("qwen3_moe", True), ("mixtral", True), ("granitemoe", False), ("qwen2_moe", False)]
)
def test_weights_that_hold_all_experts_get_no_adapter_and_that_is_said(
    family: str, refused: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of some families peft takes them for linear layers, and the export would lack what they learn."""
    make(family).save_pretrained(tmp_path)
    caplog.set_level("INFO")
    targets = "all-linear"
    if refused:
        with pytest.raises(ValueError, match=r"student.adapter.targets = 'all-linear': .*experts") as error:
            load_policy(tmp_path, "float32", adapter=AdapterConfig(rank=2))
        targets = str(error.value).rpartition("set it to ")[2]
    policy = load_policy(tmp_path, "float32", adapter=AdapterConfig(rank=2, targets=targets))
    assert caplog.text.count("no adapter for the experts' weights (model.layers.0.") == 1
    state = {name for name, _ in plain_parameters(moved(policy).model, whole)}
    assert state == {name for name, _ in load_policy(tmp_path, "float32").model.named_parameters()}


def test_an_untied_output_layer_is_merged(tmp_path: Path) -> None:
    policy = load_policy(save("llama", tmp_path), "float32", adapter=AdapterConfig(rank=2, targets="lm_head,q_proj"))
    moved(policy).eval()
    with torch.no_grad():
        adapted = policy(ROW).logprobs_S
        state = {name: value.clone() for name, value in plain_parameters(policy.model, whole)}
    plain = build("llama")
    plain.load_state_dict(state)
    expected = torch.cat([plain_logprobs(plain, PROMPTS[b // 2], r) for b, r in enumerate(RESPONSES) if r])
    torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [0, 2])
def test_only_the_language_model_of_a_model_that_sees_is_trained(rank: int, tmp_path: Path) -> None:
    make("gemma3").save_pretrained(tmp_path)
    policy = load_policy(tmp_path, "float32", adapter=AdapterConfig(rank=rank))
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all("language_model" in name or "lm_head" in name for name in trained)
    assert any("vision_tower" in name for name, _ in policy.named_parameters())


@pytest.mark.parametrize("stage", ["1", "3"])
def test_a_run_trains_the_adapter_alone_and_exports_a_plain_student(
    stage: str, tmp_path: Path, train: Callable[..., object]
) -> None:
    options = ["--student.adapter.rank", "4", "--loss.kl_coef", "0.1", "--actor.zero_stage", stage]
    options += ["--checkpoint.every", "1", "--eval.questions", "4"]
    train(tmp_path, *options, "--steps", "2")
    run = tmp_path / "grpo-minillm"
    rows = metrics(run)
    assert rows[0]["kl/reference"] == pytest.approx(0.0, abs=1e-6)
    assert rows[1]["kl/reference"] > 1e-7
    after = load_file(run / "export" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in after)
    both = [AutoModelForCausalLM.from_pretrained(run / "export"),
            AutoPeftModelForCausalLM.from_pretrained(run / "export" / "adapter")]  # fmt: skip
    merged_S, adapted_S = (plain_logprobs(model.eval(), (5, 6, 7), (8, 9, 10)) for model in both)
    torch.testing.assert_close(adapted_S, merged_S, atol=2e-5, rtol=0)
    train(tmp_path, *options, "--steps", "3")  # goes on from step 2
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    assert metrics(run)[:2] == rows
    if stage == "1":  # what it leaves may be the start of another run; its model says how long a prompt may be
        beside = Path(shutil.copytree(run / "export" / "adapter", tmp_path / "adapter"))
        train(tmp_path, "--student.path", str(beside), "--name", "next", "--steps", "1", "--eval.questions", "4")
        assert load_file(tmp_path / "next" / "export" / "model.safetensors").keys() == after.keys()
        assert context_length(beside) == context_length(run / "export") > 0
