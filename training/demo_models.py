"""The embedded demo's models: one tokenizer, a tiny teacher that knows the demo, a tinier student that only speaks.

`ensure_demo` builds everything once into a cache folder. The teacher is trained on every fact in every phrasing and
on texts made of all words (not on the held-out texts): it is the upper bound that the student is measured against.
The student's base has read the unlabelled text only. Plain torch and AdamW; DeepSpeed has its home elsewhere.

    python training/demo_models.py runs/cache
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.schema import DataConfig
from training import demo_data, demo_splits, demo_world

PAD, EOS = "<pad>", "</s>"
Size = Literal["demo", "tiny"]


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Shape and training of one model."""

    hidden: int
    layers: int
    heads: int = 4
    kv_heads: int = 2
    steps: int
    """Optimizer steps."""
    batch: int
    """Sequences a step."""
    learning_rate: float
    """Peak of AdamW; linear warm-up over the first 5 %, cosine to a tenth."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one size of the demo is made."""

    vocabulary: int
    """Entries of the tokenizer."""
    teacher_contexts: int
    """Texts with a question that the teacher is trained on."""
    context_share: float
    """Share of the teacher's batches that are such texts."""
    text_share: float
    """Share of the teacher's batches that are unlabelled text."""
    prompt_weight: float
    """Weight of the teacher's loss on a prompt token; an answer token has 1."""
    teacher: ModelRecipe
    student: ModelRecipe


RECIPES: dict[Size, Recipe] = {
    "demo": Recipe(
        vocabulary=1024,
        teacher_contexts=12000,
        context_share=0.5,
        text_share=0.03,
        prompt_weight=0.03,
        teacher=ModelRecipe(hidden=96, layers=3, steps=1700, batch=32, learning_rate=4e-3),
        student=ModelRecipe(hidden=96, layers=2, steps=250, batch=64, learning_rate=4e-3),
    ),
    "tiny": Recipe(
        vocabulary=512,
        teacher_contexts=500,
        context_share=0.35,
        text_share=0.05,
        prompt_weight=0.1,
        teacher=ModelRecipe(hidden=32, layers=2, steps=60, batch=32, learning_rate=4e-3),
        student=ModelRecipe(hidden=16, layers=1, steps=30, batch=32, learning_rate=4e-3),
    ),
}


@dataclass(frozen=True)
class DemoPaths:
    """Where the demo lies: two Hugging Face model directories and four JSONL files."""

    teacher: Path
    student_base: Path
    warmup: Path
    rl: Path
    heldout: Path
    text: Path


@dataclass(frozen=True)
class Example:
    """One training sequence: token ids, and for each the weight of the loss of predicting it."""

    ids: list[int]
    weights: list[float]


# --- tokenizer -----------------------------------------------------------------------------------------------------


def render(row: demo_data.DemoRow) -> str:
    """The prompt of a question, as the trainer's default templates make it."""
    data = DataConfig()
    if row.context is None:
        return data.template.format(question=row.question)
    return data.context_template.format(context=row.context, question=row.question)


def train_tokenizer(corpus: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any UTF-8 text comes back unchanged, nothing is added to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def tokenizer_corpus(data: demo_data.DemoData) -> list[str]:
    """What the merges are learned from: the text and every rendered question with its answer."""
    rows = [*data.warmup, *data.rl, *data.heldout]
    return [*data.text, *(f"{render(row)} {row.answers[0]}" for row in rows)]


def question_example(row: demo_data.DemoRow, tokenizer: PreTrainedTokenizerFast, prompt_weight: float) -> Example:
    """Prompt, answer and end; the first token is given, so its weight is 0."""
    prompt: list[int] = tokenizer.encode(render(row))
    answer: list[int] = [*tokenizer.encode(f" {row.answers[0]}"), tokenizer.convert_tokens_to_ids(EOS)]
    return Example(prompt + answer, [0.0] + [prompt_weight] * (len(prompt) - 1) + [1.0] * len(answer))


def text_example(text: str, tokenizer: PreTrainedTokenizerFast) -> Example:
    """A sentence or story and its end."""
    ids = [*tokenizer.encode(text), tokenizer.convert_tokens_to_ids(EOS)]
    return Example(ids, [0.0] + [1.0] * (len(ids) - 1))


# --- models --------------------------------------------------------------------------------------------------------


def new_model(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=512,
        # Texts are short: a small base gives positions that a small model can tell apart.
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def cycle(examples: Sequence[Example], rng: random.Random) -> Iterator[Example]:
    """The examples without end, each pass in a new order."""
    while True:
        yield from rng.sample(examples, len(examples))


def batch_loss(model: LlamaForCausalLM, examples: Sequence[Example]) -> torch.Tensor:
    """Weighted sum of the token losses, right-padded: a causal model does not see what follows."""
    longest = max(len(example.ids) for example in examples)
    ids_BT = torch.zeros(len(examples), longest, dtype=torch.long)
    weights_BT = torch.zeros(len(examples), longest)
    for row, example in enumerate(examples):
        ids_BT[row, : len(example.ids)] = torch.tensor(example.ids)
        weights_BT[row, : len(example.ids)] = torch.tensor(example.weights)
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    losses = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    return (losses * weights_BT[:, 1:].flatten()).sum()


def train(
    model: LlamaForCausalLM,
    streams: Sequence[tuple[float, Sequence[Example]]],
    recipe: ModelRecipe,
    seed: int,
    name: str,
) -> None:
    """AdamW on batches that mix the streams by their shares. Each batch is cut in two by length to save padding."""
    rng = random.Random(f"{seed}-{name}")
    sources = [(round(share * recipe.batch), cycle(examples, rng)) for share, examples in streams]
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    warmup = max(1, recipe.steps // 20)
    model.train()
    for step in (progress := tqdm(range(recipe.steps), desc=name, unit="step", leave=False)):
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / warmup) * decay
        batch = sorted((next(source) for count, source in sources for _ in range(count)), key=lambda one: len(one.ids))
        total = sum(sum(example.weights) for example in batch)
        value = 0.0
        for part in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            loss = batch_loss(model, part) / total
            loss.backward()
            value += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{value:.2f}", refresh=False)
    model.eval()


def build_teacher(
    data: demo_data.DemoData, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int
) -> LlamaForCausalLM:
    """The model that knows."""
    contexts = demo_data.teacher_contexts(data, recipe.teacher_contexts, seed)
    facts = demo_data.teacher_facts()
    streams = [
        (
            1 - recipe.context_share - recipe.text_share,
            [question_example(row, tokenizer, recipe.prompt_weight) for row in facts],
        ),
        (recipe.context_share, [question_example(row, tokenizer, recipe.prompt_weight) for row in contexts]),
        (recipe.text_share, [text_example(text, tokenizer) for text in data.text]),
    ]
    model = new_model(recipe.teacher, tokenizer, seed)
    train(model, streams, recipe.teacher, seed, "demo teacher")
    return model


def build_student(
    data: demo_data.DemoData, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int
) -> LlamaForCausalLM:
    """The model that has only read."""
    model = new_model(recipe.student, tokenizer, seed + 1)
    train(model, [(1.0, [text_example(text, tokenizer) for text in data.text])], recipe.student, seed, "demo student")
    return model


# --- building once -------------------------------------------------------------------------------------------------


def fingerprint(size: Size, seed: int) -> str:
    """Twelve hex digits of everything that the result depends on, threads excepted."""
    modules = (demo_data.__file__, demo_splits.__file__, demo_world.__file__, __file__)
    files = [str(file) for file in (*modules, demo_world.FRAMES_FILE, demo_splits.SENTIMENT_FILE)]
    packages = ["babel", "countryinfo", "tokenizers", "torch", "transformers"]
    parts = [f"{size} {seed} {DataConfig().template} {DataConfig().context_template}"]
    parts += [f"{package} {version(package)}" for package in packages]
    parts += [Path(file).read_text(encoding="utf-8") for file in files]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system drops it when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Torch threads for the time of the build."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def demo_paths(root: Path) -> DemoPaths:
    """The parts of a finished build."""
    return DemoPaths(
        teacher=root / "teacher",
        student_base=root / "student-base",
        warmup=root / "warmup.jsonl",
        rl=root / "rl.jsonl",
        heldout=root / "heldout.jsonl",
        text=root / "text.jsonl",
    )


def build(root: Path, *, seed: int, size: Size) -> None:
    """Make data, tokenizer and both models in the folder `root`."""
    recipe = RECIPES[size]
    data = demo_data.build_demo_data(seed)
    demo_data.write_demo_data(root, seed)
    demo_splits.write_demo_splits(root / "euroeval", seed)
    tokenizer = train_tokenizer(tokenizer_corpus(data), recipe.vocabulary)
    with torch.random.fork_rng(devices=[]):
        teacher = build_teacher(data, tokenizer, recipe, seed)
        student = build_student(data, tokenizer, recipe, seed)
    paths = demo_paths(root)
    for model, path in ((teacher, paths.teacher), (student, paths.student_base)):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)


def ensure_demo(cache_dir: str | Path, *, seed: int = 0, threads: int | None = None, size: Size = "demo") -> DemoPaths:
    """The demo below `cache_dir`, built if it is not there. `threads`: CPU threads of the build, None: all cores.

    Processes that start together build once. The folder appears under its name only when it is complete.
    """
    cache = Path(cache_dir).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    name = f"demo-{fingerprint(size, seed)}"
    if (cache / name).is_dir():
        return demo_paths(cache / name)
    with locked(cache / f".{name}.lock"):
        if not (cache / name).is_dir():
            for leftover in cache.glob(f".{name}-*"):
                shutil.rmtree(leftover)
            partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
            with cpu_threads(threads):
                build(partial, seed=seed, size=size)
            partial.chmod(0o755)
            partial.rename(cache / name)
    return demo_paths(cache / name)


if __name__ == "__main__":
    print(ensure_demo(sys.argv[1] if len(sys.argv) > 1 else "runs/cache"))
