"""Small tokenizers of every kind that language models have, trained on Faroese text with the real algorithms."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPTSw3Tokenizer, PreTrainedTokenizerFast

from tests.support.runs import ROOT

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SENTENCES = [
    "Tórshavn er høvuðsstaðurin í Føroyum, og har búgva umleið tjúgu túsund fólk.",
    "Frálæra fæst í fólkaskúlanum ella á frískúla, og børnini byrja, tá ið tey eru sjey ár.",
    "Í 1957 varð Útvarp Føroya stovnað; Sjónvarp Føroya kom í 1984.",
    "Hvat eitur størsta oyggin? Streymoy er størst, og Lítla Dímun er minst.",
    "Skipið sigldi úr Klaksvík við 12,5 tonsum av toski og hýsu.",
    "Ólavsøka er tjóðarhátíð Føroya; hon verður hildin í Havn 28. og 29. juli.",
    "Mjørkin lá tjúkk yvir fjøllunum, men á ströndini skein sólin — so fagurt!",
    "»Hvør eigur bókina?« spurdi læraranum. Eingin svaraði, og øll tagdu.",
    "Seyðurin gongur í haganum alt árið, og um heystið verður hann rikin í rætt.",
    "Ábyrgd, ætlan, ýti, ørindi, eygleiðing: nógv orð byrja við sjáldsomum stavum.",
]
KINDS = ("byte_level", "byte_level_digits", "gemma", "llama", "unigram", "unigram_nfkc", "sentencepiece")


def faroese() -> list[str]:
    """Sentences for training and for tests: those above, and real ones where they lie beside the repository."""
    path = ROOT.parent / "shared" / "data" / "faroese" / "wiki_sentences.jsonl"
    if not path.is_file():
        return SENTENCES
    return SENTENCES + [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()[:300]]


def build(kind: str, directory: Path) -> Any:
    """A tokenizer of that kind."""
    return sentencepiece_library(directory) if kind == "sentencepiece" else FAST[kind]()


def byte_level(size: int = 700, *, split: str = r"\p{N}", end: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """GPT-2's kind (SmolLM2, Llama-3, Qwen)."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[end, "<|im_start|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(faroese(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, extra_special_tokens=["<|im_start|>"])


def byte_fallback(prefix: bool, end: str) -> PreTrainedTokenizerFast:
    """Sentencepiece's BPE as tokenizer.json has it: with a space in front (Llama-2, Mistral) or without (Gemma)."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *steps] if prefix else steps)
    inner.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", end, "<bos>", *BYTES], limit_alphabet=45, show_progress=False
    )
    inner.train_from_iterator(faroese(), trainer)
    spec = json.loads(inner.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in ("<unk>", end, "<bos>")]
    spec["pre_tokenizer"] = None
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner = Tokenizer.from_str(json.dumps(spec))
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, unk_token="<unk>", bos_token="<bos>")


def unigram(end: str = "</s>", *, change: bool = False) -> PreTrainedTokenizerFast:
    """Unigram without byte fallback: what it has not seen is unknown. `change`: NFKC and single spaces first."""
    inner = Tokenizer(models.Unigram())
    if change:
        inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=800, special_tokens=["<unk>", end], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(faroese(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, unk_token="<unk>")


def sentencepiece_library(directory: Path) -> GPTSw3Tokenizer:
    """The sentencepiece library itself (GPT-SW3)."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(faroese()), model_prefix=str(directory / "spm"), vocab_size=900, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        user_defined_symbols=["<pad>"], control_symbols=["<|endoftext|>"], num_threads=1,
    )  # fmt: skip
    return GPTSw3Tokenizer(vocab_file=str(directory / "spm.model"))


FAST = {
    "byte_level": byte_level,
    "byte_level_digits": lambda: byte_level(500, split=r"\p{N}{1,3}", end="<|end|>"),
    "gemma": lambda: byte_fallback(prefix=False, end="<eos>"),
    "llama": lambda: byte_fallback(prefix=True, end="</s>"),
    "unigram": unigram,
    "unigram_nfkc": lambda: unigram(change=True),
}


def cuts(texts: list[str], seed: int) -> Iterator[str]:
    """Stretches of the texts that begin and end anywhere."""
    dice = random.Random(seed)
    while True:
        text = dice.choice(texts)
        start = dice.randrange(len(text))
        yield text[start : start + dice.randrange(1, 60)]
