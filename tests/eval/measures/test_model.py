"""eval/measures/model.py: what a measure sees of other people's models and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import processors

from configs.io import hub
from eval.measures import model as module
from eval.measures.generation import Decoding, generate
from eval.measures.model import Model, load_model, written_tokens
from eval.measures.perplexity import score_texts
from tests.support.tiny_tokenizers import build_tokenizer, save_tiny


def adapter_on(folder: Path, base: str) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def test_another_model_below_a_hub_id_or_an_adapter_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has been measured is kept for the same weights only."""
    cached = tmp_path / "cached"
    cached.mkdir()
    for place in (module, hub):
        monkeypatch.setattr(place, "find_model", lambda key, path: cached if path == "org/name" else Path(path))
    tuned = adapter_on(tmp_path / "adapter", "org/name")
    found = []
    for content in ("old", "new"):
        (cached / "model.safetensors").write_text(content)
        found.append([Model(path=path).weights for path in ("org/name", str(cached), str(tuned))])
    assert found[0][0] == found[0][1] != found[1][0]
    assert len({found[0][0], found[0][2], found[1][2]}) == 3


def test_columns_without_a_token_are_never_said(tmp_path: Path) -> None:
    """A vocabulary that is filled up to a round number, as in the trainer; here the filling is what is likeliest."""
    path = save_tiny(tmp_path / "padded", "byte_level")
    network, tokenizer = load_model(path)
    known = len(tokenizer)
    with torch.no_grad():
        plain = network(torch.tensor([[5, 6, 7]])).logits[..., :known].log_softmax(-1)
    network.resize_token_embeddings(known + 7)
    weight = network.get_input_embeddings().weight  # the output layer's too
    with torch.no_grad():
        weight[known:] = 50.0 * weight[:known].mean(0) + torch.randn(7, weight.shape[1])
        widened = network(torch.tensor([[5, 6, 7]])).logits.log_softmax(-1)
    assert (widened[..., known:].exp().sum(-1) > 0.01).all()
    network.save_pretrained(path)
    with torch.no_grad():
        found = Model(path=str(path)).network(torch.tensor([[5, 6, 7]])).logits.log_softmax(-1)
    assert (found[..., known:] == -torch.inf).all()
    torch.testing.assert_close(found[..., :known], plain, atol=1e-5, rtol=0)


def test_a_model_that_computes_no_numbers_is_refused(tmp_path: Path) -> None:
    """Weights that are broken, or float16 that overflows: else the first token would be its answer to everything."""
    path = save_tiny(tmp_path / "broken", "byte_level")
    model = Model(path=str(path))
    with torch.no_grad():
        model.network.get_input_embeddings().weight[:, 0] = float("nan")
    for sampled in (False, True):
        with pytest.raises(ValueError, match=r"broken: its logits are not numbers \(NaN\)"):
            generate(model.network, [[5, 6, 7]], Decoding(max_new_tokens=2, batch=1, sampled=sampled))
    with pytest.raises(ValueError, match=r"broken: its logits are not numbers \(NaN\)"):
        score_texts(model.network, model.tokenizer, ["the sea and the town"])


def test_a_written_prompt_has_one_start_and_no_end() -> None:
    """Of a tokenizer that puts both around every text (Llama's with add_eos_token)."""
    tokenizer = build_tokenizer("byte_level")
    around = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=around
    )
    bare = tokenizer("the sea", add_special_tokens=False)["input_ids"]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer("the sea")["input_ids"] == [start, *bare, end]
    assert written_tokens(tokenizer, "the sea") == [start, *bare]
    assert written_tokens(tokenizer, "<s>the sea") == [start, *bare]
    assert written_tokens(tokenizer, "<s>the sea</s>") == [start, *bare, end]  # a turn that its template has ended
    tokenizer.bos_token = None
    assert written_tokens(tokenizer, "the sea") == [start, *bare]


def test_an_adapter_with_more_tokens_than_its_base(tmp_path: Path) -> None:
    """It was trained behind `resize_token_embeddings`, as chat models of base models are."""
    base = save_tiny(tmp_path / "base", "byte_level", tied=False)
    network, tokenizer = load_model(base)
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    network.resize_token_embeddings(len(tokenizer))
    ids = torch.tensor([[5, len(tokenizer) - 1, 7]])
    wrapped = get_peft_model(network, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        expected = wrapped(ids).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    model = Model(path=str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(model.network(ids).logits, expected, atol=1e-5, rtol=0)
    assert model.tokenizer.convert_tokens_to_ids("<|turn|>") == len(tokenizer) - 1
