"""Models that grouped attention does not reach, or may not be used for, run in plain rows: sampling and training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from configs.schema import SamplingConfig
from inference.attention.packing import groups_of, pack_row
from inference.attention.plain_rows import plain_rows
from tests.support.student_models import build, plain_logprobs, save
from training.data.order import random_stream
from training.experience import Samples
from training.student.loading import load_policy
from training.student.policy import Policy, Way
from training.student.sampling import Drawing, sample

PROMPTS = [(3, 4, 5, 6), (7,), (8, 9)]


def draw_from(policy: Policy) -> Samples:
    settings = SamplingConfig(group_size=3, max_new_tokens=6)
    streams = [random_stream(0, 0, n) for n in range(3)]
    return sample(policy, PROMPTS, settings, Drawing([2, 3, 11, 12, 13], streams))


def test_a_model_that_cannot_be_packed_says_so_and_samples_and_trains_in_plain_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """BLOOM's alibi: sampling (left-padded, its own cache) and training (right-padded) against one unpadded row."""
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        hidden_size=16, n_layer=2, n_head=2, vocab_size=20, initializer_range=0.5, hidden_dropout=0.0, eos_token_id=2
    )
    model = transformers.BloomForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, "float32").eval()
    assert "grouped attention does not reach BloomForCausalLM" in caplog.text
    samples = draw_from(policy)
    assert {len(r) for r in samples.responses_B} != {6}  # some leave the batch early
    row = pack_row(groups_of(PROMPTS, samples.responses_B, 3))
    logprobs_S = policy(row).logprobs_S
    expected = torch.cat([plain_logprobs(model, PROMPTS[b // 3], r) for b, r in enumerate(samples.responses_B)])
    torch.testing.assert_close(samples.behavior_logprobs_S, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logprobs_S, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_plain_rows_sample_and_score_what_packed_rows_do(family: str, tmp_path: Path) -> None:
    policy = load_policy(save(family, tmp_path), "float32").eval()
    packed = draw_from(policy)
    row = pack_row(groups_of(PROMPTS, packed.responses_B, 3))
    with torch.no_grad():
        scored = policy(row).logprobs_S
        policy.run(Way.PLAIN)
        plain = draw_from(policy)
        rescored = policy(row).logprobs_S
    assert plain.responses_B == packed.responses_B
    torch.testing.assert_close(plain.behavior_logprobs_S, packed.behavior_logprobs_S, atol=1e-5, rtol=0)
    torch.testing.assert_close(rescored, scored, atol=1e-5, rtol=0)
    # ... and both are what transformers says of each response alone.
    expected = torch.cat([plain_logprobs(build(family), PROMPTS[b // 3], r) for b, r in enumerate(packed.responses_B)])
    torch.testing.assert_close(scored, expected, atol=1e-5, rtol=0)


def test_a_window_that_only_a_mask_says_is_seen_however_long_it_is(tmp_path: Path) -> None:
    """PhiMoE's class names its window to the mask alone. The tokens that a model is tried on at the start are fewer."""
    torch.manual_seed(0)
    config = transformers.PhimoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64, sliding_window=16,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, "float32").eval()
    prompt, response = tuple(range(3, 33)), (40, 41, 42)
    with torch.no_grad():
        found = policy(pack_row(groups_of([prompt], [response], 1))).logprobs_S
        torch.testing.assert_close(found, plain_logprobs(model, prompt, response), atol=1e-5, rtol=0)


def test_plain_rows_undo_a_packed_row() -> None:
    row = pack_row(groups_of([(1, 2, 3), (4,)], [(5, 6), (), (7,), (8, 9, 10)], 2))
    plain = plain_rows(row)
    # An empty response predicts nothing, so it has no row; the last token of a response is no input.
    assert plain.tokens_BL.tolist() == [[1, 2, 3, 5], [4, 4, 4, 4], [4, 8, 9, 4]]
    assert plain.mask_BL.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert plain.sequence_S.tolist() == [0, 0, 1, 2, 2, 2]
    assert plain.place_S.tolist() == [2, 3, 0, 0, 1, 2]


def test_a_row_without_responses_is_its_prompts() -> None:
    plain = plain_rows(pack_row(groups_of([(1, 2), (3,)], [], 0)))
    assert plain.tokens_BL.tolist() == [[1, 2], [3, 3]]
    assert len(plain.sequence_S) == 0


def test_weights_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    """transformers would fill what is missing with random numbers and go on."""
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack 1 tensors .model\.layers\.1\.mlp\.up_proj"):
        load_policy(tmp_path, "float32")


def test_quantised_weights_whose_library_is_not_here_are_named(tmp_path: Path) -> None:
    save("llama", tmp_path)
    file = tmp_path / "config.json"
    how = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": how}))
    with pytest.raises(ValueError, match=r"^student\.path = .*: transformers does not load it \("):
        load_policy(tmp_path, "float32")


def test_a_window_that_the_class_does_not_have_lets_no_key_go(tmp_path: Path) -> None:
    """config.json of a Llama with a sliding_window: transformers' cache would have it, its forward pass has not."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5, sliding_window=16, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, "float32").eval()
    prompt = tuple(range(3, 28))
    samples = sample(policy, [prompt], SamplingConfig(group_size=2, max_new_tokens=8), Drawing([], None))
    expected = torch.cat([plain_logprobs(model, prompt, response) for response in samples.responses_B])
    torch.testing.assert_close(samples.behavior_logprobs_S, expected, atol=1e-4, rtol=0)


def test_weights_that_the_configuration_leaves_out_are_refused(tmp_path: Path) -> None:
    """transformers would drop them and go on; a head or a layer of another kind belongs to no module, and may stay."""
    save("llama", tmp_path)
    tensors = {**load_file(tmp_path / "model.safetensors"), "score.weight": torch.ones(1, 32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_policy(tmp_path, "float32")
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"have 1 tensors that config\.json leaves out .*q_proj\.bias.*attention_bias"):
        load_policy(tmp_path, "float32")
