"""eval/heldout.py on tiny models: right numbers for known answers, one-line errors for mistakes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.io.results import Result, read_result
from configs.prompts import Format, as_text, render
from configs.schema import DataConfig
from eval.heldout import main
from eval.measures.heldout import HeldoutSettings, answers, heldout
from eval.measures.model import Model
from eval.measures.open_questions import OpenSettings, open_questions
from eval.pages.compare_scores import read_heldout
from eval.pages.comparison import unlike
from training.data.prompts import load_prompts
from training.evaluation import answer_rows

ROOT = Path(__file__).resolve().parents[3]
WORDS = ["<pad>", "</s>", "Spurningur", "Tekstur", "Svar", ":", "?", "Hvat", "eitur", "høvuðsstaðurin", "í", "Noregi"]
ANSWERS = ["Oslo", "Reykjavík", "Havn", "og"]
QUESTIONS = [
    {"id": "a", "question": "Hvat eitur høvuðsstaðurin?", "answers": ["Oslo og Havn"]},
    {"id": "b", "question": "Hvat?", "answers": ["Reykjavík", "oslo"]},
    {"id": "c", "question": "Hvat eitur?", "context": "høvuðsstaðurin í Noregi eitur Oslo", "answers": ["Havn"]},
]


def tokenizer() -> PreTrainedTokenizerFast:
    words = WORDS + ANSWERS
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def save_model(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + len(ANSWERS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=1.0,  # large, so that the likeliest token depends on the prompt
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def save_oracle(path: Path, reply: list[str]) -> Path:
    """A model that says `reply` and stops, whatever it is asked: each word's successor is written into its weights."""
    save_model(path)
    model = LlamaForCausalLM.from_pretrained(path)
    words = WORDS + ANSWERS
    chain = [":", *reply, "</s>"]  # every prompt ends with "Svar:"
    with torch.no_grad():
        for layer in model.model.layers:  # residual branches off: the state is the last word's embedding
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for dimension, (word, successor) in enumerate(pairwise(chain)):
            model.model.embed_tokens.weight[words.index(word), dimension] = 1.0
            model.lm_head.weight[words.index(successor), dimension] = 1.0
    model.save_pretrained(path)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_run(runs: Path, name: str, reply: list[str], **data: object) -> Path:
    """A run folder as training/main.py leaves it."""
    run = runs / name
    save_oracle(run / "export", reply)
    heldout = write_jsonl(run / "heldout.jsonl", QUESTIONS)
    config = {"data": {"heldout": str(heldout), **data}, "sampling": {"max_new_tokens": 4}, "eval": {"batch": 2}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def read(run: Path) -> Result:
    return read_result(run / "eval" / "heldout.json")


def test_newest_run_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = make_run(tmp_path / "runs", "older", ["Havn"])
    newer = make_run(tmp_path / "runs", "newer", ["Oslo"])
    old = time.time() - 1000
    os.utime(older / "export" / "config.json", (old, old))
    assert main(["--runs_dir", str(tmp_path / "runs")]) == 0

    result = read(newer)
    # "Oslo" against "Oslo og Havn": precision 1, recall 1/3, F1 1/2; against "oslo": 1; against "Havn": 0.
    assert [row["prediction"] for row in result.rows] == ["Oslo", "Oslo", "Oslo"]
    assert [row["f1"] for row in result.rows] == pytest.approx([50.0, 100.0, 0.0])
    assert result.values["f1"].value == pytest.approx(50.0)
    assert result.values["exact_match"].value == pytest.approx(100 / 3)
    assert result.data["rows"] == 3
    assert result.rows[2]["context"] == QUESTIONS[2]["context"]
    assert result.data["sha256"] == hashlib.sha256((newer / "heldout.jsonl").read_bytes()).hexdigest()
    assert not (older / "eval").exists()
    assert not list((newer / "eval").glob(".*"))  # nothing half-written is left
    assert "50 (0 to 100)" in capsys.readouterr().out


def test_several_models_answer_the_same_questions(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "one", ["Havn", "og", "Oslo"])
    stranger = save_oracle(tmp_path / "stranger", ["Havn"])
    arguments = ["--model", str(stranger), str(run / "export"), "--runs_dir", str(tmp_path / "runs")]
    assert main(arguments) == 0
    ours = read(run)
    [file] = (tmp_path / "runs" / "models").glob("stranger-*/eval/heldout.json")
    theirs = read_result(file)
    # Word order does not count in F1: 1 for the first, 1/3 each of precision with recall 1 (F1 1/2) for the others.
    assert ours.values["f1"].value == pytest.approx(100 * (1 + 0.5 + 0.5) / 3)
    assert theirs.values["f1"].value == pytest.approx(100 * (0.5 + 0 + 1) / 3)
    assert ours.values["exact_match"].value == 0
    assert ours.data == theirs.data
    assert ours.settings == theirs.settings


def test_batched_answers_equal_single_ones(tmp_path: Path) -> None:
    """Left padding must be neither seen nor counted in the positions; checked against greedy decoding by hand."""
    model = Model(path=str(save_model(tmp_path / "model")))
    settings = HeldoutSettings(data=tmp_path, max_new_tokens=6, batch=3)
    asked = [as_text(render(question, settings.template)) for question in QUESTIONS]
    prompts = [list(Format(model.tokenizer).prompt(text)) for text in asked]
    assert len({len(prompt) for prompt in prompts}) == 3
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] != 1):
            with torch.no_grad():
                ids.append(int(model.network(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(model.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    assert answers(model, prompts, settings) == expected
    assert len(set(expected)) > 1  # the model does look at its prompt


def test_long_prompts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Prompts have 8, 6 and 14 tokens.
    run = make_run(tmp_path / "runs", "one", ["Oslo"], max_prompt_tokens=9)
    assert main(["--runs_dir", str(tmp_path / "runs")]) == 0
    result = read(run)
    assert (result.data["rows"], result.data["of"], result.data["skipped_too_long"]) == (2, 3, 1)
    assert result.values["f1"].value == pytest.approx(75.0)
    assert "1 questions skipped: prompt too long" in capsys.readouterr().out

    config = yaml.safe_load((run / "config.yaml").read_text())
    config["eval"]["questions"] = 1  # counted among those that fit, as in training
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["--runs_dir", str(tmp_path / "runs")]) == 0
    [row] = read(run).rows
    assert (row["id"], row["f1"]) == ("a", pytest.approx(50.0))

    config["data"]["max_prompt_tokens"] = 5
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["--runs_dir", str(tmp_path / "runs")]) == 2
    assert "every prompt is longer than 5 tokens (the shortest has 6)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "export" / "config.json").unlink(), "no run with export/config.json in it"),
        (lambda run: (run / "export" / "model.safetensors").unlink(), "no weights"),
        (lambda run: (run / "export" / "model.safetensors").write_bytes(b"half"), "cannot be loaded"),
        (lambda run: [file.unlink() for file in (run / "export").glob("token*")], "no tokenizer"),
        (lambda run: (run / "heldout.jsonl").write_text(""), "heldout.jsonl: the file has no row"),
        (lambda run: (run / "heldout.jsonl").write_text('{"question": "x"}'), "heldout.jsonl:1: key 'answers'"),
        (lambda run: (run / "heldout.jsonl").write_text("{}\n{"), "heldout.jsonl:1: key 'question' is missing"),
        (lambda run: (run / "heldout.jsonl").unlink(), "heldout.jsonl: no such file"),
        (lambda run: (run / "config.yaml").write_text("- a"), "config.yaml: not the config.yaml of a run"),
        (lambda run: (run / "config.yaml").write_text("a: {"), "config.yaml: while parsing a flow node"),
        (lambda run: (run / "config.yaml").unlink(), "give --data FILE.jsonl"),
    ],
)
def test_mistakes_get_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], break_it: object, message: str
) -> None:
    run = make_run(tmp_path / "runs", "one", ["Oslo"])
    break_it(run)  # type: ignore[operator]
    assert main(["--runs_dir", str(tmp_path / "runs")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]


def test_as_a_command(tmp_path: Path) -> None:
    """Started as a script, from another folder: exit code 2, one line, no traceback, and no wait for torch."""
    command = [sys.executable, str(ROOT / "eval" / "heldout.py"), "--model", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --model nowhere: no such directory; give a Hugging Face model directory or a hub id\n"
    assert done.stdout == ""


def test_a_tokenizer_without_an_end_has_the_models(tmp_path: Path) -> None:
    path = save_oracle(tmp_path / "model", ["Oslo", "og", "Havn"])
    nameless = tokenizer()
    nameless.eos_token = None
    nameless.save_pretrained(path)
    settings = HeldoutSettings(data=write_jsonl(tmp_path / "h.jsonl", QUESTIONS), max_new_tokens=6)
    found = heldout(Model(path=str(path)), settings)
    assert found.rows[0]["prediction"] == "Oslo og Havn"


@pytest.mark.parametrize("thinks", [False, True])
def test_thoughts_that_do_not_end_are_no_answer(thinks: bool, tmp_path: Path) -> None:
    """R1's chat template has begun them; its thoughts are nobody's prediction, nor are they right by a pattern."""
    path = save_oracle(tmp_path / "model", ["Oslo"])
    chat = tokenizer()
    chat.chat_template = "{{ messages[0]['content'] }}" + ("<think>\n" if thinks else "")
    chat.save_pretrained(path)
    rows = [{"question": "Hvat?", "answers": ["Oslo"], "pattern": ".*Oslo.*"}]
    asked = {"data": write_jsonl(tmp_path / "h.jsonl", rows), "max_new_tokens": 4, "template": "{question} Svar:"}
    model = Model(path=str(path))
    with pytest.MonkeyPatch.context() as context:  # the word is not in this vocabulary: the prompt ends before it
        context.setattr(Format, "prompt", lambda self, prompt: tuple(self.text(prompt)))
        closed = heldout(model, HeldoutSettings(**asked)).rows[0]
        several = open_questions(model, OpenSettings(**asked, samples=2)).rows[0]
    assert closed["prediction"] == ("" if thinks else "Oslo")
    assert ("" in several["answers"]) == thinks


def test_the_trainer_and_the_measure_know_a_question_alike(tmp_path: Path) -> None:
    rows = [{"question": "Hvat?", "answers": ["Havn"]}, {"id": None, "question": "Hvat eitur?", "answers": ["Oslo"]}]
    file = write_jsonl(tmp_path / "h.jsonl", rows)
    path = save_oracle(tmp_path / "model", ["Oslo"])
    measured = heldout(Model(path=str(path)), HeldoutSettings(data=file, max_new_tokens=4))
    prompts = load_prompts(
        "data.heldout", DataConfig(heldout=str(file)), Format(tokenizer()), room=60, need_answers=True
    )
    trained = replace(measured, rows=answer_rows(prompts, [str(row["prediction"]) for row in measured.rows]))
    scores = [read_heldout(one, tmp_path)["heldout/f1"] for one in (measured, trained)]
    assert unlike(*scores) == []
    assert [score.examples.ids for score in scores if score.examples is not None] == [("\nHvat?", "\nHvat eitur?")] * 2
