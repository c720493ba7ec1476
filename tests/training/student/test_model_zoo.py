"""Every family of docs/models.md as a student: what is computed is what transformers computes, or it is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.support.model_zoo import FAMILIES, ROOT, Found, try_student
from training.student.loading import load_policy, mean_gap, own_logprobs, probe
from training.student.policy import Policy

DOCS = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_right_or_refused(family: str) -> None:
    found = try_student(family)
    row = re.search(rf"^\| {re.escape(family)} \| (.*) \| (.*) \|$", DOCS, re.MULTILINE)
    assert row is not None, "write the table again: python -m tests.support.model_zoo"
    if found.gap is None:
        assert (row[1], row[2]) == ("-", "refused")
    else:
        assert row[1] == found.way
        assert found.gap < 1e-4
        assert float(row[2]) < 1e-4


def test_what_is_refused_says_why() -> None:
    """BERT looks ahead: no way of running it agrees."""
    found = try_student("bert")
    assert found == Found(found.way, None)
    assert re.match(r"student.path = 'bert': BertLMHeadModel cannot be trained here: its log-probabilities", found.way)


def test_rwkvs_weights_stay_as_they_are_in_the_file(tmp_path: Path) -> None:
    """In evaluation mode its class divides those of later layers, and an export would hold them so."""
    config = transformers.RwkvConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32, rescale_every=1
    )
    transformers.RwkvForCausalLM(config).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    policy = load_policy(tmp_path, "float32").eval()
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, saved.get(name, parameter)), name


def test_what_rounding_does_is_measured_in_the_models_own_type() -> None:
    """Half of the embedding's numbers one step lower: little in float32, in bfloat16 at least
    a thousand times as much. The weights stay as they were."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.3,
        )  # fmt: skip
        policy = Policy(transformers.LlamaForCausalLM(config).to(dtype).eval())
        before = policy.model.get_input_embeddings().weight.detach().clone()
        groups = probe(policy)
        with torch.no_grad():
            own_S = own_logprobs(policy, groups)
            found[dtype] = mean_gap(own_logprobs(policy, groups, rounded=True), own_S)
            assert torch.equal(own_logprobs(policy, groups), own_S)
        assert torch.equal(policy.model.get_input_embeddings().weight, before)
    assert 0 < found[torch.float32] < 1e-5
    assert found[torch.bfloat16] > 1000 * found[torch.float32]
