"""Generation behind a common beginning against Hugging Face's `generate`, prompt by prompt, in double precision."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig

from eval.measures.generation import Decoding, Journal, common_prefix, generate

VOCABULARY, END, NEW = 97, 1, 8
CONFIGS: dict[str, tuple[Any, int]] = {
    "llama": (
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.5,
        ),
        100,
    ),
    # A window that the prompts outgrow: no row may be padded.
    "mistral": (
        MistralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.5, sliding_window=24,
        ),
        40,
    ),
    "gemma3": (
        Gemma3TextConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, initializer_range=0.5, sliding_window=20,
            layer_types=["sliding_attention", "full_attention"],
        ),
        30,
    ),
    "gpt2": (GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5), 30),
}  # fmt: skip


def decoding(**settings: Any) -> Decoding:
    return Decoding(**{"max_new_tokens": NEW, "batch": 4, "ends": frozenset({END}), **settings})


def make_model(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


def make_prompts(count: int, shared: int = 40) -> list[list[int]]:
    rng = random.Random(0)
    prefix = [rng.randrange(2, VOCABULARY) for _ in range(shared)]
    return [prefix + [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, 12))] for _ in range(count)]


def hugging_face(model: Any, prompt: list[int], new: int = NEW) -> list[int]:
    output = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False, max_new_tokens=new, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generations_equal_hugging_face(name: str) -> None:
    """200 prompts over four architectures."""
    config, count = CONFIGS[name]
    model, prompts = make_model(config), make_prompts(count)
    assert common_prefix(prompts) == 40
    ours = [one.tokens for one in generate(model, prompts, decoding(batch=16))]
    assert ours == [hugging_face(model, prompt) for prompt in prompts]
    assert len({tuple(tokens) for tokens in ours}) > count / 2  # the model does look at its prompt
    assert any(len(tokens) < NEW for tokens in ours) or name != "llama"  # some generation ends by itself


def test_prompts_without_a_common_beginning() -> None:
    model = make_model(CONFIGS["llama"][0])
    prompts = make_prompts(9, shared=0)
    assert common_prefix(prompts) == 0
    ours = generate(model, prompts, decoding(max_new_tokens=4, batch=4))
    assert [one.tokens for one in ours] == [hugging_face(model, prompt, 4) for prompt in prompts]


def test_common_prefix_leaves_a_token_of_each() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_prefix([[1, 2], [1, 2, 4]]) == 1
    assert common_prefix([[1, 2], [1, 2]]) == 1
    assert common_prefix([[1]]) == 0


def test_a_stop_in_the_text_ends_a_generation() -> None:
    model, prompts = make_model(CONFIGS["llama"][0]), make_prompts(12)
    free = [one.tokens for one in generate(model, prompts, decoding(ends=frozenset(), batch=5))]
    stop = free[0][2]
    spell = decoding(ends=frozenset(), batch=5, stops=(f"<{stop}>",), decode=lambda ids: "".join(f"<{i}>" for i in ids))
    stopped = generate(model, prompts, spell)
    for tokens, one in zip(free, stopped, strict=True):
        assert one.tokens == (tokens[: tokens.index(stop) + 1] if stop in tokens else tokens)


def test_choices_are_the_likeliest_by_tree_and_logprobs_are_the_models() -> None:
    """Choices of one token: the argmax of each one's own forward pass. Of several: greedy along the tree of them."""
    model, prompts = make_model(CONFIGS["llama"][0]), make_prompts(40)
    choices = ((5,), (6,), (7, 8), (7, 9))
    found = generate(model, prompts, decoding(ends=frozenset(), max_new_tokens=4, choices=choices, logprobs=3, batch=7))
    for prompt, one in zip(prompts, found, strict=True):
        with torch.no_grad():
            first = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            second = model(torch.tensor([[*prompt, 7]])).logits[0, -1].log_softmax(-1)
        best = max((5, 6, 7), key=lambda token: float(first[token]))
        assert one.tokens == ([best] if best != 7 else [7, max((8, 9), key=lambda token: float(second[token]))])
        assert next(iter(one.logprobs[0])) == best
        assert one.logprobs[0][best] == pytest.approx(float(first[best]), abs=1e-5)
        likeliest = first.topk(3).indices.tolist()
        assert set(one.logprobs[0]) == {best, *likeliest}
    assert len({tuple(one.tokens) for one in found}) >= 3


def test_a_journal_is_gone_on_with(tmp_path: Path) -> None:
    """Half of the prompts in one call, all of them in the next: what is known is not generated again."""
    model, prompts = make_model(CONFIGS["llama"][0]), make_prompts(10)
    steps: list[int] = []
    plain = generate(model, prompts, decoding(logprobs=2))
    generate(model, prompts[:5], decoding(logprobs=2), Journal(tmp_path / "j.jsonl"), steps.append)
    assert steps == [0, 4, 1]
    with (tmp_path / "j.jsonl").open("a") as file:
        file.write('{"key": "cut off')
    steps.clear()
    found = generate(model, [*prompts, prompts[9]], decoding(logprobs=2), Journal(tmp_path / "j.jsonl"), steps.append)
    assert steps == [6, 4, 1]  # five known and one twice, then the rest in batches
    assert [one.tokens for one in found] == [one.tokens for one in [*plain, plain[9]]]
    for one, other in zip(found, plain, strict=False):
        for place, same in zip(one.logprobs, other.logprobs, strict=True):
            assert place == pytest.approx(same)
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.key(prompts[0], decoding(logprobs=2)) in journal.known
    assert journal.key(prompts[0], decoding(logprobs=2, max_new_tokens=3)) not in journal.known


def test_refusals() -> None:
    model = make_model(CONFIGS["llama"][0])
    with pytest.raises(ValueError, match="without a token"):
        generate(model, [[]], decoding())
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="only models whose layers all are attention"):
        generate(model, [[1]], decoding())
