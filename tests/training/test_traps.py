"""Mistakes that others shipped, by their number in docs/traps.md; what other test files hold is named there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers

from configs.prompts import Format
from configs.schema import AdapterConfig, LossConfig
from inference.attention.packing import Group, pack_row
from rewards.minillm import reverse_kl, tail_reverse_kl
from tests.support import teacher_models
from tests.support.experiences import prompts_of, rollout_of
from tests.support.student_models import VOCAB, save
from training.data.order import positions_of_step
from training.losses import (
    OutputLayer,
    PolicyTokens,
    WholeDistribution,
    forward_kl,
    generalized_jsd,
    policy_loss,
    reverse_kl_term,
    sampled_cross_entropy,
)
from training.student.adapters import adapter_off
from training.student.loading import load_policy
from training.student.policy import Policy

ROOT = Path(__file__).resolve().parents[2]


def test_trap_01_an_end_symbol_that_is_also_the_pad_counts() -> None:
    """Token 0 is the end symbol and what padding is filled with: a token's place comes from lengths, so it is kept."""
    rollout = rollout_of(prompts_of([(0, 5)]), [(7, 0, 0), (0,)])
    assert rollout.lengths_B.tolist() == [3, 1]
    row = pack_row(rollout.groups())
    assert row.tokens_T.tolist() == [0, 5, 7, 0]  # the pad id in the prompt stays as well
    assert row.labels_S.tolist() == [7, 0, 0, 0]


def test_trap_06_an_importance_weight_is_not_clipped_with_the_ratio() -> None:
    """Weights of 3 and 0.1 on ratios inside the clip range change the loss in proportion and clip nothing."""
    ratio, advantages = torch.tensor([1.1, 0.9, 1.5]), torch.tensor([1.0, -1.0, 2.0])
    importance = torch.tensor([3.0, 0.1, 2.0])
    response = torch.zeros(3, dtype=torch.int64)
    tokens = PolicyTokens(ratio.log(), torch.zeros(3), advantages, importance, response)
    loss, clipped = policy_loss(tokens, LossConfig(clip_low=0.2, clip_high=0.2))
    assert float(loss) == pytest.approx(-(3 * 1.1 - 0.1 * 0.9 + 2 * 1.2 * 2.0))
    assert clipped.tolist() == [False, False, True]


def test_trap_06_no_gradient_flows_through_an_importance_weight() -> None:
    logprobs = torch.tensor([0.0, 0.0], requires_grad=True)
    response, importance = torch.zeros(2, dtype=torch.int64), (2.0 * logprobs).exp()
    tokens = PolicyTokens(logprobs, torch.zeros(2), torch.ones(2), importance, response)
    loss, _ = policy_loss(tokens, LossConfig(clip_low=0.2, clip_high=0.2))
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [-1.0, -1.0]


def test_trap_10_reductions_of_bfloat16_logits_are_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, teacher = (8 * torch.randn(20, 300, generator=generator).bfloat16() for _ in range(2))
    ids = torch.arange(30).expand(20, 30)
    logprobs = teacher.float().log_softmax(-1).gather(-1, ids)
    for function in (
        reverse_kl, forward_kl, lambda x, y: generalized_jsd(x, y, 0.3),
        lambda x, _: sampled_cross_entropy(x, ids, logprobs), lambda x, _: tail_reverse_kl(x, ids, logprobs),
    ):  # fmt: skip
        got = function(policy, teacher)
        assert got.dtype == torch.float32
        assert torch.equal(got, function(policy.float(), teacher.float()))


def test_trap_10_a_bfloat16_policy_takes_its_log_softmax_in_float32_in_any_chunks(tmp_path: Path) -> None:
    policy = load_policy(save("llama", tmp_path), "bfloat16").eval()
    row = pack_row([Group(prompt=(5, 6, 7), responses=((8, 9, 10, 2), (11, 12), tuple(range(20, 31))))])
    seen: list[torch.Tensor] = []

    def keep(logits: torch.Tensor, _: slice) -> torch.Tensor:
        seen.append(logits.detach())
        return logits[:, 0].float()

    with torch.no_grad():
        whole = policy(row, temperature=0.7, terms={"keep": keep})
        assert seen[0].dtype == torch.bfloat16
        expected = (seen[0].float() / 0.7).log_softmax(-1).gather(-1, row.labels_S[:, None])[:, 0]
        assert torch.allclose(whole.logprobs_S, expected, atol=1e-5)  # in bfloat16 it would be off by 1e-2
        policy.logit_chunk = 3
        assert torch.allclose(policy(row, temperature=0.7).logprobs_S, expected, atol=1e-5)


def test_trap_16_every_end_symbol_of_the_model_ends_a_response(tmp_path: Path) -> None:
    """And trap 17: an end symbol with the id 0 is one."""
    from training.student.actor import end_tokens

    policy = load_policy(save("llama", tmp_path), "float32")
    policy.model.generation_config.eos_token_id = [7, 0]
    assert end_tokens(policy, Format(SimpleNamespace(eos_token_id=9))) == (0, 7, 9)
    policy.model.generation_config.eos_token_id = None
    assert end_tokens(policy, Format(SimpleNamespace(eos_token_id=0))) == (0,)
    assert end_tokens(policy, Format(SimpleNamespace(eos_token_id=None), model_ends=(3,))) == (3,)
    with pytest.raises(ValueError, match="names no eos_token"):
        end_tokens(policy, Format(SimpleNamespace(eos_token_id=None)))


def test_trap_17_no_code_takes_a_token_id_for_a_truth_value() -> None:
    """`pad_token_id or eos_token_id` is wrong where the pad id is 0, and so is `if eos_token_id`."""
    name = r"[\w.]*(pad|eos|bos|unk)_(token_)?id"
    wrong = re.compile(rf"{name}\s+(or|and)\b|\b(if|or|and|not)\s+{name}\s*:")
    assert wrong.search("x = a.pad_token_id or a.eos_token_id")
    assert wrong.search("if tokenizer.eos_token_id:")
    for folder in ("configs", "training", "inference", "rewards", "eval"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not wrong.search(file.read_text(encoding="utf-8")), file


def forgetful_model(directory: Path) -> Path:
    """A model whose configuration asks for dropout, as GPT-2's and GPT-SW3's do."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, resid_pdrop=0.5,
        embd_pdrop=0.5, attn_pdrop=0.5, eos_token_id=2,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def warm_up_adapter(base: Path, directory: Path) -> Path:
    """What supervised warm-up with an adapter leaves: an adapter that is not zero, in a directory of its own."""
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(directory))
    return directory


def answered(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy(pack_row([Group(prompt=(5, 6, 7), responses=((8, 9, 10, 2), (11, 12)))])).logprobs_S


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("adapter", [False, True])
def test_trap_19_dropout_is_off_even_in_training_mode(adapter: bool, tmp_path: Path) -> None:
    path = forgetful_model(tmp_path / "base")
    if adapter:
        path = warm_up_adapter(path, tmp_path / "adapter")
    policy = load_policy(path, "float32")
    assert torch.equal(answered(policy.eval()), answered(policy.train()))


def test_trap_24_the_reference_of_an_adapter_is_what_warm_up_left(tmp_path: Path) -> None:
    """Warm-up wrote an adapter, RL trains another: switched off, it leaves the warmed-up student, not its base."""
    base = save("llama", tmp_path / "base")
    warm = warm_up_adapter(base, tmp_path / "warm")
    start = answered(load_policy(warm, "float32").eval())
    assert float((start - answered(load_policy(base, "float32").eval())).abs().max()) > 0.1
    policy = load_policy(warm, "float32", adapter=AdapterConfig(rank=2)).eval()
    assert torch.allclose(answered(policy), start, atol=1e-6)  # the new adapter starts at zero
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert float((answered(policy) - start).abs().max()) > 0.1
    with adapter_off(policy.model):
        assert torch.allclose(answered(policy), start, atol=1e-6)


@pytest.mark.parametrize(("size", "count"), [(10, 4), (6, 3), (5, 8), (1, 3)])
def test_trap_25_an_epoch_takes_every_item_once_wherever_a_run_is_resumed(size: int, count: int) -> None:
    """Which items a step takes is a function of the step alone: no cursor that a boundary or a resume could lose."""
    steps = 4 * size
    taken = [positions_of_step(step, count, size, seed=3) for step in range(steps)]
    assert all(len(step) == count for step in taken)  # no short or empty step at an epoch's end
    flat = [i for step in taken for i in step]
    epochs = [flat[e * size : (e + 1) * size] for e in range(len(flat) // size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 1:
        assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew
    for resumed in (0, 1, size // count, size, steps - 1):
        assert positions_of_step(resumed, count, size, seed=3) == taken[resumed]


@pytest.mark.parametrize("more", ["policy", "teacher"])
def test_trap_26_columns_that_only_one_side_has_do_not_count(more: str) -> None:
    """One tokenizer, vocabularies padded to 4 and to 6: the two extra logits are huge and mean nothing."""
    generator = torch.Generator().manual_seed(0)
    policy, teacher = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    expected = reverse_kl(policy, teacher)
    extra = torch.full((3, 2), 50.0)
    if more == "policy":
        policy = torch.cat([policy, extra], 1)
    else:
        teacher = torch.cat([teacher, extra], 1)
    term = reverse_kl_term(WholeDistribution(teacher, OutputLayer(torch.eye(teacher.shape[1]))))
    assert torch.allclose(term(policy, slice(0, 3)), expected, atol=1e-6)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_trap_27_the_teacher_is_frozen_and_in_evaluation_mode(one_rank: None, tmp_path: Path) -> None:
    from inference.attention.packed import PackedPlan
    from inference.model.teacher import Teacher

    teacher_models.build("llama", tmp_path)
    teacher = Teacher(tmp_path, "float32")
    assert not any(module.training for module in teacher.model.modules())
    parameters = list(teacher.model.parameters())
    assert len(parameters) > 10
    assert not any(p.requires_grad or p.grad is not None for p in parameters)
    teacher.model.requires_grad_(True)  # and if they did want gradients, the forward pass would keep no graph
    row = pack_row([Group(prompt=(5, 6, 7), responses=((8, 9, 10),))])
    with torch.enable_grad():
        hidden = teacher.forward(row.tokens_T, row.positions_T, PackedPlan(row))
    assert hidden.grad_fn is None
    assert not hidden.requires_grad


def test_trap_27_the_teachers_folder_knows_no_optimizer() -> None:
    for file in (ROOT / "inference").rglob("*.py"):
        assert not re.search(r"torch\.optim|get_megatron_optimizer|\.backward\(", file.read_text(encoding="utf-8")), (
            file
        )


def test_the_table_names_a_test_that_exists_for_each_trap() -> None:
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", (ROOT / "docs" / "traps.md").read_text(encoding="utf-8"), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 28))
    for number, held_by in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", held_by)
        assert named, f"trap {number}"
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file}::{test}"
