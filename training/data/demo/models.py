"""The embedded demo's models: one tokenizer, a tiny teacher that knows the demo, a tinier student that only speaks.

`ensure_demo` builds everything once into a cache folder. The teacher is trained on every fact in every phrasing and
on texts made of all words (not on the held-out texts): it is the upper bound that the student is measured against.
The student's base has read the unlabelled text only. Plain torch and AdamW; DeepSpeed has its home elsewhere.
"""

from __future__ import annotations

import hashlib
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from configs.io.files import locked
from configs.prompts import as_text, render
from configs.schema import DataConfig
from inference.server.launch import launcherless_environment
from training import distributed
from training.data.demo import sentences as demo_data
from training.data.demo import splits as demo_splits
from training.data.demo import tell as demo_tell
from training.data.demo import world as demo_world
from training.data.order import share_of_rank
from training.run import launcher

PAD, EOS = "<pad>", "</s>"
Size = Literal["demo", "small", "tiny"]


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
    """Peak of AdamW; linear warm-up over the first 5 %, cosine to zero."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one size of the demo is made."""

    vocabulary: int
    """Entries of the tokenizer."""
    teacher_contexts: int
    """Texts with a question that the teacher is trained on."""
    context_share: float
    """Share of the teacher's batches that are such texts."""
    tell_share: float
    """Share of the teacher's batches that are open questions with a right answer."""
    text_share: float
    """Share of the teacher's batches that are unlabelled text."""
    prompt_weight: float
    """Weight of the teacher's loss on a prompt token; an answer token has 1."""
    teacher: ModelRecipe
    student: ModelRecipe


DEMO = Recipe(
    vocabulary=1024,
    teacher_contexts=12000,
    context_share=0.4,
    tell_share=0.3,
    text_share=0.1,
    prompt_weight=0.03,
    teacher=ModelRecipe(hidden=96, layers=3, steps=2000, batch=32, learning_rate=5e-3),
    student=ModelRecipe(hidden=64, layers=2, steps=800, batch=64, learning_rate=6e-3),
)
RECIPES: dict[Size, Recipe] = {
    "demo": DEMO,
    # A student that can hold still less of what the same teacher knows (configs/crossing.yaml).
    "small": replace(DEMO, student=replace(DEMO.student, hidden=32)),
    "tiny": Recipe(
        vocabulary=512,
        teacher_contexts=500,
        context_share=0.35,
        tell_share=0.1,
        text_share=0.05,
        prompt_weight=0.1,
        teacher=ModelRecipe(hidden=32, layers=2, steps=60, batch=32, learning_rate=4e-3),
        student=ModelRecipe(hidden=16, layers=1, steps=30, batch=32, learning_rate=4e-3),
    ),
}


@dataclass(frozen=True)
class DemoPaths:
    """Where the demo lies: two Hugging Face model directories and five JSONL files."""

    teacher: Path
    student_base: Path
    warmup: Path
    rl: Path
    heldout: Path
    open: Path
    text: Path

    @classmethod
    def below(cls, root: Path) -> DemoPaths:
        """The parts of a build in the folder `root`."""
        files = {name: root / f"{name}.jsonl" for name in ("warmup", "rl", "heldout", "open", "text")}
        return cls(teacher=root / "teacher", student_base=root / "student-base", **files)


@dataclass(frozen=True)
class Example:
    """One training sequence: token ids, and for each the weight of the loss of predicting it."""

    ids: list[int]
    weights: list[float]


# --- tokenizer -----------------------------------------------------------------------------------------------------


def rendered(row: demo_data.DemoRow) -> str:
    """The prompt of a question, as the trainer's default templates make it."""
    return as_text(render({"question": row.question, "context": row.context}, DataConfig().template))


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
    rows = [*data.warmup, *data.rl, *data.heldout, *demo_data.teacher_tells(500, 0)]
    return [*data.text, *(f"{rendered(row)} {row.answers[0]}" for row in rows if row.answers)]


def question_example(row: demo_data.DemoRow, tokenizer: PreTrainedTokenizerFast, prompt_weight: float) -> Example:
    """Prompt, answer and end; the first token is given, so its weight is 0."""
    prompt: list[int] = tokenizer.encode(rendered(row))
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


def cut_in_two(batch: Sequence[Example]) -> list[Sequence[Example]]:
    """The batch, sorted by length, as a part of short sequences and one of long ones, about as many tokens in each when
    padded."""
    lengths = [len(example.ids) for example in batch]
    cut = min(range(1, len(batch)), key=lambda n: max(n * lengths[n - 1], (len(batch) - n) * lengths[-1]))
    return [batch[:cut], batch[cut:]]


def train(
    model: LlamaForCausalLM,
    streams: Sequence[tuple[float, Sequence[Example]]],
    recipe: ModelRecipe,
    seed: int,
    name: str,
) -> None:
    """AdamW on batches that mix the streams by their shares. Each batch is cut in two by length to save padding; of two
    processes each takes a part."""
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
    place, quiet = int(name == "demo student"), not distributed.is_main()
    progress = tqdm(range(recipe.steps), name, leave=False, unit="step", position=place, disable=quiet)
    for step in progress:
        decay = (1 + math.cos(math.pi * step / recipe.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / warmup) * decay
        batch = sorted((next(source) for count, source in sources for _ in range(count)), key=lambda one: len(one.ids))
        total = sum(sum(example.weights) for example in batch)
        value = 0.0
        for part in share_of_rank(cut_in_two(batch), distributed.rank(), distributed.world_size()):
            loss = batch_loss(model, part) / total
            loss.backward()
            value += loss.item()
        if distributed.world_size() > 1:
            gradients = [cast(torch.Tensor, parameter.grad) for parameter in model.parameters()]
            vector_to_parameters(distributed.sum_in_place(parameters_to_vector(gradients)), gradients)
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

    def asked(rows: Sequence[demo_data.DemoRow]) -> list[Example]:
        return [question_example(row, tokenizer, recipe.prompt_weight) for row in rows]

    streams = [
        (1 - recipe.context_share - recipe.tell_share - recipe.text_share, asked(demo_data.teacher_facts())),
        (recipe.context_share, asked(contexts)),
        (recipe.tell_share, asked(demo_data.teacher_tells(recipe.teacher_contexts, seed))),
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
    modules = (demo_data.__file__, demo_tell.__file__, demo_splits.__file__, demo_world.__file__, __file__)
    files = [str(file) for file in (*modules, demo_world.FRAMES_FILE, demo_splits.SENTIMENT_FILE)]
    packages = ["babel", "countryinfo", "tokenizers", "torch", "transformers"]
    parts = [f"{size} {seed} {render({'question': '?', 'context': '?'}, DataConfig().template)}"]
    parts += [f"{package} {version(package)}" for package in packages]
    parts += [Path(file).read_text(encoding="utf-8") for file in files]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def build(root: Path, *, seed: int, size: Size) -> None:
    """Make data, tokenizer and both models in the folder `root`."""
    data = demo_data.build_demo_data(seed)
    demo_data.write_demo_data(root, seed)
    demo_splits.write_demo_splits(root / "euroeval", seed)
    tokenizer = train_tokenizer(tokenizer_corpus(data), RECIPES[size].vocabulary)
    paths = DemoPaths.below(root)
    builders = []
    with tempfile.TemporaryDirectory() as meeting:  # by a file: two that start together cannot choose one port
        for path, ranks in ((paths.teacher, 2), (paths.student_base, 1)):
            tokenizer.save_pretrained(path)
            for rank in range(ranks):
                environment = launcherless_environment() | {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
                line = [sys.executable, __file__, str(path), str(seed), size, f"{meeting}/{path.name}"]
                builders.append(subprocess.Popen(line, env=environment))
        while any(builder.poll() is None for builder in builders):
            if any(builder.returncode for builder in builders):  # the others may wait for it
                for builder in builders:
                    builder.terminate()
            time.sleep(0.1)
    if any(builder.returncode for builder in builders):
        raise RuntimeError("a model of the demo was not built; what went wrong is above")


def build_model(path: Path, seed: int, size: Size, meeting: str) -> None:
    """Train the model of the folder `path` (teacher or student-base), beside its tokenizer. Matrices this small gain
    nothing from a second thread, so the models are trained side by side, and the teacher by two processes, which meet
    by the file `meeting`."""
    torch.set_num_threads(1)
    launcher.join_on_cpu(meeting)
    logging.disable_progress_bar()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    make = build_teacher if path.name == "teacher" else build_student
    model = make(demo_data.build_demo_data(seed), tokenizer, RECIPES[size], seed)
    if distributed.is_main():
        model.save_pretrained(path)


def ensure_demo(cache_dir: str | Path, *, seed: int = 0, size: Size = "demo") -> DemoPaths:
    """The demo below `cache_dir`, built if it is not there.

    Processes that start together build once. The folder appears under its name only when it is complete.
    """
    cache = Path(cache_dir).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    name = f"demo-{fingerprint(size, seed)}"
    if (cache / name).is_dir():
        return DemoPaths.below(cache / name)
    with locked(cache / f".{name}.lock"):
        if not (cache / name).is_dir():
            for leftover in cache.glob(f".{name}-*"):
                shutil.rmtree(leftover)
            partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
            build(partial, seed=seed, size=size)
            partial.chmod(0o755)
            partial.rename(cache / name)
    return DemoPaths.below(cache / name)


if __name__ == "__main__":
    build_model(Path(sys.argv[1]), int(sys.argv[2]), cast(Size, sys.argv[3]), sys.argv[4])
