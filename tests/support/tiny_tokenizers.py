"""Small tokenizers of the three kinds, learned from English so that Faroese splits badly, and a tiny model for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
ENGLISH = [
    "The islands lie in the north of the sea and have few trees.",
    "In the winter the sheep stay on the hills, and the boats stay at home.",
    "There were many questions about the number of people in the town.",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 .,!?:",
] * 3


def build_tokenizer(kind: str, size: int = 400) -> PreTrainedTokenizerFast:
    """`byte_level`: GPT-2's kind; `sentencepiece`: BPE with byte fallback; `unigram`: unigram with unknown letters."""
    if kind == "byte_level":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
    elif kind == "sentencepiece":
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    else:
        inner = Tokenizer(models.Unigram())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    inner.train_from_iterator(ENGLISH, trainer)
    if kind == "sentencepiece":
        # Bytes as plain pieces of the model, as sentencepiece's converters write them.
        import json

        content = json.loads(inner.to_str())
        vocab = content["model"]["vocab"]
        content["model"]["vocab"] = vocab | {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
        inner = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def save_tiny(
    directory: Path, kind: str, seed: int = 0, *, train: Sequence[str] = (), steps: int = 0, tied: bool = True
) -> Path:
    """A tiny Llama with such a tokenizer, trained for `steps` on the texts in `train`."""
    tokenizer = build_tokenizer(kind)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied,
            initializer_range=0.05, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = [[1, *tokenizer(text, add_special_tokens=False)["input_ids"][:150], 2] for text in train]
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = [texts[i] for i in torch.randint(len(texts), (16,), generator=order).tolist()]
        ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, text in enumerate(batch):
            ids[row, : len(text)] = labels[row, : len(text)] = torch.tensor(text)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
