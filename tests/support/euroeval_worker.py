"""What the tests of EuroEval do in one process of its own: importing EuroEval takes long and changes global settings.

    python tests/support/euroeval_worker.py FOLDER RUNS [PART ...]

Plays the hub itself. RUNS holds a finished run of the tiny demo. Writes FOLDER/PART.json;
tests/eval/euroeval/test_euroeval.py has the expectations.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.euroeval.data import OFFICIAL, TASKS, stage
from tests.support.hub_server import Hub
from training.data.demo.splits import SENTIMENT_FILE, write_demo_splits

WORK, FINISHED = map(Path, sys.argv[1:3])
SPLITS = WORK / "splits"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LABELS = ("ja", "nei", "positivt", "neutralt", "negativt")


def serve() -> Hub:
    """The demo's splits as the official data sets of a hub."""
    for name in ("foqa", "fosent"):
        target = WORK / "hub" / TASKS[name].source
        target.parent.mkdir(parents=True, exist_ok=True)
        stage(SPLITS, WORK / "staged", name).rename(target)
    return Hub(WORK / "hub")


write_demo_splits(SPLITS)
hub = serve()
os.environ |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(WORK / "hf"), "HF_HUB_OFFLINE": "0"}  # read when imported

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval import run_euroeval
from eval.euroeval import model as euroeval_model
from eval.euroeval.model import Engine, SamplingParams
from eval.measures import generation
from eval.measures.generation import Journal


def save_model(path: Path, template: str | None = None) -> Path:
    """A random model that looks at its prompt, with every label a token of its own, after a space and without."""
    texts = [json.loads(line)["text"] for line in (SPLITS / "scala-fo" / "train.jsonl").read_text().splitlines()]
    corpus = [*texts, *[f"{label} {label}" for label in LABELS for _ in range(50)], SENTIMENT_FILE.read_text()]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>", "<user>", "<assistant>"]
    inner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=4096, initializer_range=0.4, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def run(*arguments: str) -> dict[str, Any]:
    """Exit status and what was said by eval/run_euroeval.py."""
    out, err = io.StringIO(), io.StringIO()
    where = ["--runs_dir", str(WORK / "runs"), "--cache_dir", str(WORK / "cache")]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_euroeval.main([*where, *arguments])
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "errors": errors}


def result(model: Path) -> dict[str, Any]:
    """The result file of a model outside of any run, and where it lies."""
    [file] = (WORK / "runs" / "models").glob(f"{model.name}-*/eval/euroeval.json")
    return {"path": str(file), **json.loads(file.read_text())}


class RuleEngine(Engine):
    """Answers by a rule that is right now and then, so that no score is 0 or 100."""

    def generate(
        self, prompts: Sequence[str], sampling_params: SamplingParams, use_tqdm: Any = None, lora_request: Any = None
    ) -> list[SimpleNamespace]:
        choices = sampling_params.structured_outputs and sampling_params.structured_outputs.choice
        replies = [self.encode(self.reply(prompt, choices)) for prompt in prompts]
        return [
            SimpleNamespace(prompt=prompt, outputs=[SimpleNamespace(token_ids=reply, logprobs=None)])
            for prompt, reply in zip(prompts, replies, strict=True)
        ]

    @staticmethod
    def reply(prompt: str, choices: Sequence[str] | None) -> str:
        asked = prompt.rsplit("\n\n", 1)[-1]
        pick = sum(asked.encode())  # anything that differs from row to row
        if choices:
            return choices[pick % len(choices)]
        names = [word for word in re.findall(r"\w+", asked.split("\n")[0])[2:] if word[0].isupper()] or ["x"]
        if asked.startswith("Setningur"):
            people, places = names[: pick % 3], names[pick % 2 :]
            return json.dumps(
                {"persónur": people, "staður": places, "felagsskapur": [], "ymiskt": []}, ensure_ascii=False
            )
        return f"{names[pick % len(names)]} og annað" if pick % 3 else names[-1]


class WatchedEngine(Engine):
    """Notes what was asked with a choice."""

    chosen: ClassVar[list[tuple[str, list[str], str]]] = []

    def generate(
        self, prompts: Sequence[str], sampling_params: SamplingParams, use_tqdm: Any = None, lora_request: Any = None
    ) -> list[SimpleNamespace]:
        outputs = super().generate(prompts, sampling_params, use_tqdm, lora_request)
        if sampling_params.structured_outputs and (choices := sampling_params.structured_outputs.choice):
            for prompt, output in zip(prompts, outputs, strict=True):
                self.chosen.append((prompt, choices, self.tokenizer.decode(output.outputs[0].token_ids)))
        return outputs


class WatchedJournal(Journal):
    """Counts what is generated, and breaks off behind `limit` prompts."""

    generated: ClassVar[int] = 0
    limit: ClassVar[int | None] = None

    def add(self, found: Any) -> None:
        super().add(found)
        type(self).generated += len(found)
        if self.limit is not None and self.generated >= self.limit:
            raise KeyboardInterrupt


def separately(model: Path) -> dict[str, Any]:
    """Every choice of the run that has just been watched, against each label's own forward pass."""
    network = LlamaForCausalLM.from_pretrained(model).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    wrong, said = 0, set()
    with torch.no_grad():
        for prompt, choices, reply in WatchedEngine.chosen:
            scores = []
            for choice in choices:
                ids, label = tokenizer.encode(prompt), tokenizer.encode(choice, add_special_tokens=False)
                logprobs = network(torch.tensor([ids + label])).logits[0].log_softmax(-1)
                scores.append(sum(float(logprobs[len(ids) + i - 1, token]) for i, token in enumerate(label)))
            wrong += choices[scores.index(max(scores))] != reply
            said.add(reply)
    rows = len(WatchedEngine.chosen)
    WatchedEngine.chosen.clear()
    return {"rows": rows, "wrong": wrong, "said": sorted(said)}


def formats() -> dict[str, Any]:
    """Our table of the tasks beside the installed configurations."""
    from eval.euroeval.run import dataset_configs

    installed = {
        name: [one.source, one.num_few_shot_examples, sorted(one.labels), not one.unofficial, one.task.task_group.value]
        for name, one in dataset_configs().items()
    }
    ours = {
        name: [one.source, one.few_shot, sorted(one.labels), name in OFFICIAL, one.kind] for name, one in TASKS.items()
    }
    return {"installed": installed, "ours": ours}


LOCAL = ["--data", str(SPLITS), "--iterations", "2"]


def demo() -> dict[str, Any]:
    """The newest run's student on the demo's splits."""
    euroeval_model.Engine = Engine
    return run("--runs_dir", str(FINISHED), "--iterations", "2")


def ruled() -> dict[str, Any]:
    """All four tasks, answered by a rule."""
    euroeval_model.Engine = RuleEngine
    model = save_model(WORK / "ruled")
    return run("--model", str(model), *LOCAL) | {"result": result(model)}


def labels() -> dict[str, Any]:
    """The tasks with labels, for a base and a chat model."""
    euroeval_model.Engine = WatchedEngine
    found = {}
    for name, template in (("base", None), ("chat", CHAT)):
        model = save_model(WORK / name, template)
        ran = run("--model", str(model), "--tasks", "scala-fo", "fosent", "--split", "val", *LOCAL)
        found[name] = ran | {"choices": separately(model), "result": result(model)}
    return found


def adapter() -> dict[str, Any]:
    """An adapter, and the same merged by hand: what they say to the same questions."""
    from peft import LoraConfig, get_peft_model

    euroeval_model.Engine = Engine
    base, merged, tuned = save_model(WORK / "under"), WORK / "merged", WORK / "adapter"
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"])
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tuned)
    model.merge_and_unload().save_pretrained(merged)
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(merged)
    arguments = ["--tasks", "foqa", "--split", "val", "--data", str(SPLITS), "--iterations", "1"]
    ran = run("--model", *map(str, (base, tuned, merged)), *arguments)
    return ran | {folder.name: result(folder) for folder in (base, tuned, merged)}


def broken() -> dict[str, Any]:
    """Broken off in the second task and given again, beside an unbroken run of the same weights."""
    euroeval_model.Engine, generation.Journal = Engine, WatchedJournal
    arguments = ["--tasks", "scala-fo", "foqa", "--split", "val", "--batch", "4", *LOCAL]
    models = {name: save_model(WORK / name) for name in ("broken", "whole")}
    WatchedJournal.generated = 0
    run("--model", str(models["whole"]), *arguments)
    found: dict[str, Any] = {"whole": result(models["whole"]), "all": WatchedJournal.generated, "counts": []}
    WatchedJournal.limit = WatchedJournal.generated - 8
    for _ in range(3):
        WatchedJournal.generated = 0
        try:
            run("--model", str(models["broken"]), *arguments)
        except KeyboardInterrupt:
            found["before"] = result(models["broken"])
        WatchedJournal.limit = None
        found["counts"].append(WatchedJournal.generated)
    return found | {"after": result(models["broken"])}


def online() -> dict[str, Any]:
    """The unmodified configurations from a hub of which one data set goes away, then all of it."""
    euroeval_model.Engine = Engine
    arguments = ["--model", str(save_model(WORK / "online")), "--tasks", "foqa", "fosent", "--iterations", "1"]
    arguments += ["--split", "val"]
    found = {}
    for name, down in (("down", ["EuroEval/fosent"]), ("up", []), ("gone", ["EuroEval/foqa", "EuroEval/fosent"])):
        hub.asked.clear()
        hub.down = set(down)
        found[name] = run(*arguments) | {"asked": list(hub.asked)}
    return found | {"result": result(WORK / "online")}


PARTS = {part.__name__: part for part in (formats, demo, ruled, labels, adapter, broken, online)}

if __name__ == "__main__":
    for chosen in sys.argv[3:] or PARTS:
        (WORK / f"{chosen}.json").write_text(json.dumps(PARTS[chosen]()), encoding="utf-8")
    hub.close()
