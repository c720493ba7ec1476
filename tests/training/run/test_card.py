"""The model card of an export says what the run says; the upload is two calls, and its failure a warning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import ModelCard

from configs.checks import validate
from configs.io.hub import hub_id
from configs.schema import DataConfig, ExportConfig, RunConfig, StudentConfig, TeacherConfig
from training.run import card
from training.run.card import licence_of, publish, push


def test_the_card_of_a_finished_run(finished_run: Path) -> None:
    found = ModelCard.load(finished_run / "export" / "README.md")
    assert found.data.language == "fo"
    assert found.data.library_name == "transformers"
    assert "reinforcement learning (grpo + minillm) from a teacher, 3 steps." in found.text
    assert "| | F1, % | Exact match, % | Reverse KL, nats a token |" in found.text
    for row in ("student before", "student after", "teacher"):
        assert f"| {row} |" in found.text
    assert "training/main.py --demo_size tiny" in found.text
    assert "The teacher's licence: not said in its directory." in found.text


def test_names_numbers_and_licences(tmp_path: Path) -> None:
    teacher = tmp_path / "models--google--gemma-3-27b-it" / "snapshots" / "abc"
    teacher.mkdir(parents=True)
    (teacher / "README.md").write_text("---\nlicense: gemma\n---\n# Gemma\n")
    student = tmp_path / "my" / "student-7b"
    student.mkdir(parents=True)
    (student / "LICENSE.txt").write_text("\n  Apache License\nVersion 2.0\n")
    (tmp_path / "heldout.jsonl").write_text("{}")
    config = RunConfig(
        name="a-run",
        student=StudentConfig(path=str(student)),
        teacher=TeacherConfig(path=str(teacher)),
        data=DataConfig(heldout=str(tmp_path / "heldout.jsonl")),
    )
    scores = {"before": {"f1": 12.345, "reverse_kl": 1.23456}, "after": {"f1": 50.0}}
    publish(tmp_path, config, "distillation from a teacher, 7 steps", scores, ["owner/questions:train", None])
    text = (tmp_path / "README.md").read_text()
    assert "| before | 12.3 | 1.235 |" in text
    assert "| after | 50.0 |  |" in text
    assert "- Student: my/student-7b\n- Teacher: google/gemma-3-27b-it\n" in text
    assert "- Data: owner/questions:train\n- Held-out questions: heldout.jsonl\n" in text
    assert "The teacher's licence: gemma." in text
    assert "license: Apache License\n" in text
    assert str(tmp_path) not in text  # what is given away names no folder of this machine
    publish(tmp_path, config, "continued pre-training on raw text, 7 steps", {}, ["text.jsonl"])
    assert "gemma" not in (tmp_path / "README.md").read_text()
    assert (hub_id(teacher), hub_id(student), licence_of(tmp_path / "my")) == ("google/gemma-3-27b-it", None, None)


class Hub:
    """Of HfApi what is called."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    broken = False

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        if self.broken:
            raise OSError("403 Forbidden:\n you have no right to write")
        self.calls.append(("create", name, private, exist_ok))

    def upload_folder(self, *, folder_path: Path, repo_id: str, commit_message: str) -> str:
        self.calls.append(("upload", folder_path, repo_id))
        return f"https://hub/{repo_id}/commit/1"


def test_the_upload(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(card, "HfApi", Hub)
    push(tmp_path, "me/faroese-7b")
    assert Hub.calls == [("create", "me/faroese-7b", True, True), ("upload", tmp_path, "me/faroese-7b")]
    assert capsys.readouterr().out == "uploaded: https://hub/me/faroese-7b/commit/1\n"
    monkeypatch.setattr(Hub, "broken", True)
    push(tmp_path, "me/faroese-7b")
    assert [record.getMessage() for record in caplog.records] == [
        "export.push_to_hub = 'me/faroese-7b': not uploaded (403 Forbidden: you have no right to write); "
        f"`hf upload me/faroese-7b {tmp_path}` does it by hand"
    ]


@pytest.mark.parametrize("name", ["faroese", "a/b/c", "me/a b"])
def test_a_repository_is_owner_and_name(name: str) -> None:
    validate(replace(RunConfig(), export=ExportConfig(push_to_hub="me/faroese-7b")))
    with pytest.raises(
        ValueError, match=f"^export.push_to_hub = '{name}': name a repository of the hub as owner/name$"
    ):
        validate(replace(RunConfig(), export=ExportConfig(push_to_hub=name)))
