"""eval/measures/translate.py: prompts, greedy translations, scores, going on after a stop, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.io.results import Result, read_result
from eval.measure import main
from eval.measures import generation
from eval.measures.translate import ends_of, load_parallel, prompt_text
from training.data.demo.models import RECIPES, new_model, train_tokenizer

ROWS = [
    {"fao": "Hon er heima.", "eng": "She is at home.", "dan": "Hun er hjemme."},
    {"fao": "Bilurin er bláur.", "eng": "The car is blue.", "dan": "Bilen er blå."},
    {"fao": "Eg veit tað ikki.", "eng": "I do not know.", "dan": "Jeg ved det ikke."},
]
SHOWN = [{"fao": "Góðan dag.", "eng": "Good day.", "dan": "Goddag."}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokenizer knows line breaks."""
    folder = tmp_path_factory.mktemp("model")
    texts = [f"Faroese: {row['fao']}\nEnglish: {row['eng']}\n\nDanish: {row['dan']}\n" for row in ROWS] * 5
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(0)
    new_model(RECIPES["tiny"].teacher, tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(model: Path, folder: Path, *more: str) -> list[str]:
    data, examples = write(folder / "data.jsonl", ROWS), write(folder / "shown.jsonl", SHOWN)
    return [
        "translate", "--model", str(model), "--data", str(data), "--examples", str(examples), "--few_shot", "1",
        "--batch", "2", "--max_new_tokens", "8", "--runs_dir", str(folder / "runs"), *more,
    ]  # fmt: skip


def result(folder: Path) -> Result:
    (file,) = (folder / "runs" / "models").glob("*/eval/translate.json")
    return read_result(file)


def rows(found: Result, direction: str) -> list[dict[str, Any]]:
    return [row for row in found.rows if row["direction"] == direction]


def test_prompts() -> None:
    base = prompt_text("Góðan dag.", "fao-eng", [("Ja.", "Yes.")], False)
    assert base == "Faroese: Ja.\nEnglish: Yes.\n\nFaroese: Góðan dag.\nEnglish:"
    chat = prompt_text("Good day.", "eng-fao", [], True)
    assert chat.startswith("Translate the following sentence from English into Faroese.")
    assert chat.endswith("\n\nGood day.")


def test_translations_and_scores(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model_dir, tmp_path, "--directions", "fao-eng", "eng-fao")) == 0
    found = result(tmp_path)
    assert list(found.data) == ["fao-eng", "eng-fao"]
    one = rows(found, "fao-eng")
    # Each as the model alone writes it: its likeliest tokens, one after the other, up to an end or a line break.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    for row, given in zip(one, ROWS, strict=True):
        prompt = prompt_text(given["fao"], "fao-eng", [(SHOWN[0]["fao"], SHOWN[0]["eng"])], False)
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        while len(ids) < start + 8:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id or "\n" in tokenizer.decode([ids[-1]]):
                break
        text = tokenizer.decode(ids[start:], skip_special_tokens=True).strip().split("\n")[0].strip()
        about = {"direction": "fao-eng", "id": row["id"]}
        assert row == {**about, "source": given["fao"], "reference": given["eng"], "written": text}
    assert any(row["written"] for row in one)
    written, references = ([row[key] for row in one] for key in ("written", "reference"))
    for name, metric in (("chrf", CHRF(word_order=2)), ("bleu", BLEU())):
        score = metric.corpus_score(written, [references])
        assert found.values[f"fao-eng/{name}"].value == pytest.approx(score.score)
        assert "version:" in found.settings[f"{name}_signature"]
    assert "nw:2" in found.settings["chrf_signature"]  # chrF++
    assert "fao-eng/chrf" in capsys.readouterr().out


def test_a_stopped_call_is_gone_on_with(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = generation._Rows.generate, []

    def counted(self: Any, suffixes: list[list[int]]) -> Any:
        asked.append(len(suffixes))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(self, suffixes)

    monkeypatch.setattr(generation._Rows, "generate", counted)
    call = arguments(model_dir, tmp_path, "--directions", "dan-fao")
    with pytest.raises(KeyboardInterrupt):
        main(call)
    assert not list(tmp_path.glob("runs/models/*/eval/translate.json"))
    assert main(call) == 0
    assert asked == [2, 1, 1]  # two sentences were kept, and only the third was asked for again
    assert [file.name for file in tmp_path.glob("runs/models/*/eval/*")] == ["translate.json"]
    first = result(tmp_path)
    assert main(call) == 0
    assert asked == [2, 1, 1]  # all were kept
    assert result(tmp_path) == first
    # Another direction is added; other data replace what was there.
    assert main([*call[:-1], "fao-dan"]) == 0
    assert asked == [2, 1, 1, 2, 1]
    assert list(result(tmp_path).data) == ["dan-fao", "fao-dan"]
    assert rows(result(tmp_path), "dan-fao") == first.rows
    assert main([*call, "--sentences", "2"]) == 0
    assert asked == [2, 1, 1, 2, 1, 2]
    assert [len(rows(result(tmp_path), direction)) for direction in ("dan-fao", "fao-dan")] == [2, 3]


def test_a_chat_model_is_asked_in_its_template(model_dir: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}Svar:"
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(chat)
    tokenizer.save_pretrained(chat)
    assert main(arguments(chat, tmp_path, "--directions", "fao-eng", "--sentences", "1")) == 0
    assert result(tmp_path).settings["kind"] == "instruct"
    assert result(tmp_path).settings["few_shot"] == 0
    model = AutoModelForCausalLM.from_pretrained(chat)
    assert tokenizer.eos_token_id in ends_of(model, tokenizer, True)
    assert len(ends_of(model, tokenizer, True)) < len(ends_of(model, tokenizer, False))


def test_a_model_that_can_think_aloud_is_asked_not_to(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or its translation would be the line `<think>`."""
    chat, prompts = tmp_path / "chat", []
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}heima{% endif %}"
    )
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(chat)
    tokenizer.save_pretrained(chat)
    plain = generation.generate

    def listening(network: Any, asked: list[list[int]], *more: Any) -> Any:
        prompts.append(tokenizer.decode(asked[0]))
        return plain(network, asked, *more)

    monkeypatch.setattr(generation, "generate", listening)
    call = arguments(chat, tmp_path, "--directions", "fao-eng", "--sentences", "1")
    assert main(call) == main([*call, "--chat_template_kwargs", "{}"]) == 0
    assert [prompt.endswith("heima") for prompt in prompts] == [True, False]


def test_thoughts_are_no_translation(model_dir: Path, tmp_path: Path) -> None:
    """Of a template that begins them whatever it is asked (R1)."""
    chat = tmp_path / "chat"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = "{{ messages[0].content }}\n<think>\n"
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(chat)
    tokenizer.save_pretrained(chat)
    assert main(arguments(chat, tmp_path, "--directions", "fao-eng")) == 0
    assert [row["written"] for row in result(tmp_path).rows] == ["", "", ""]


def test_flores_folder_and_csv_hold_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "flores200_dataset" / "devtest"
    folder.mkdir(parents=True)
    for language, code in (("fao", "fao_Latn"), ("eng", "eng_Latn")):
        (folder / f"{code}.devtest").write_text("".join(row[language] + "\n" for row in ROWS), encoding="utf-8")
    table = "fao,eng\n" + "".join(f'"{row["fao"]}","{row["eng"]}"\n' for row in ROWS)
    (tmp_path / "own.csv").write_text(table, encoding="utf-8")
    one = load_parallel(str(folder.parent), ["fao", "eng"], "devtest")
    other = load_parallel(str(tmp_path / "own.csv"), ["fao", "eng"], "devtest")
    assert one.sentences == other.sentences
    assert one.sentences["fao"][2] == "Eg veit tað ikki."
    assert one.digest(["fao", "eng"]) == other.digest(["fao", "eng"]) != one.digest(["eng", "fao"])


def test_mistakes_get_one_line(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(*words: str) -> str:
        assert main(["translate", "--model", str(model_dir), "--runs_dir", str(tmp_path / "runs"), *words]) == 2
        *_, error = capsys.readouterr().err.strip().splitlines()  # behind the bar of a model that is loaded
        assert error.startswith("error: ")
        return error

    data = str(write(tmp_path / "data.jsonl", ROWS))
    assert "none:dan_Latn:devtest: no such file; give a .jsonl" in ask("--data", str(tmp_path / "none"))
    assert "give other sentences for the prompts in --examples" in ask("--data", data)
    assert "a sentence of the prompt is translated too" in ask("--data", data, "--examples", data, "--few_shot", "2")
    assert "has 1 sentences" in ask("--data", data, "--examples", str(write(tmp_path / "one.jsonl", SHOWN)))
    lacking = write(tmp_path / "lacking.jsonl", [ROWS[0], {"fao": "Ja.", "eng": "Yes."}])
    assert "lacking.jsonl:2: key 'dan' is missing" in ask("--data", str(lacking))
    assert "no data set 'facebook/flores'" in ask("--data", "facebook/flores")  # HF_HUB_OFFLINE is set in tests
    short = ("--data", data, "--few_shot", "0", "--max_new_tokens", "100000", "--directions", "fao-eng")
    assert "lower --few_shot or --max_new_tokens" in ask(*short)
    folder = tmp_path / "flores" / "devtest"
    folder.mkdir(parents=True)
    assert "dan_Latn.devtest: no such file; a FLORES-200 folder has it" in ask("--data", str(folder.parent))
    for code in ("dan", "eng", "fao"):
        (folder / f"{code}_Latn.devtest").write_text("A.\n\nC.\n" if code == "fao" else "A.\nB.\nC.\n")
    assert "fao_Latn.devtest, line 2: is blank" in ask("--data", str(folder.parent))
    (folder / "fao_Latn.devtest").write_text("A.\nC.\n")
    assert "{'dan': 3, 'eng': 3, 'fao': 2} sentences; each" in ask("--data", str(folder.parent))
    assert not (tmp_path / "runs").exists()  # nothing half-written
