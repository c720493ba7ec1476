"""The model card of an export, made from its run, and the way to the hub."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, metadata_load

from configs.io.hub import hub_id
from configs.io.results import HELDOUT
from configs.schema import RunConfig

log = logging.getLogger(__name__)
Scores = Mapping[str, Mapping[str, float]]
"""Scores by whose they are and what they measure."""
TEXT = """
# {name}

Trained by GRPO-KD: {how}.

{table}

## How it was made

{facts}

```bash
{command}
```

## Licence

{licence}
"""


def publish(export: Path, config: RunConfig, how: str, scores: Scores, data: Sequence[str | None]) -> None:
    """README.md of a model directory, which is then uploaded where export.push_to_hub asks for it.

    `how`: what the run did, in a few words, `teacher` among them where there was one; `data`: what it learnt from.
    """
    student, teacher = Path(config.student.path), Path(config.teacher.path)
    taught = "teacher" in how
    head = ModelCardData(
        language="fo",
        license=licence_of(student),
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=hub_id(student),
        tags=["grpo-kd", "knowledge-distillation"],
    )
    facts = {
        "Student": _named(student),
        "Teacher": _named(teacher) if taught else None,
        **{f"Teacher {extra.name}": _named(Path(extra.path)) for extra in config.teachers if taught},
        "Data": ", ".join(_data(path) for path in data if path),
        "Held-out questions": _data(config.data.heldout),
        "Seed": str(config.seed),
    }
    licence = (
        f"The teacher's licence: {licence_of(teacher) or 'not said in its directory'}. This model has learnt from the "
        "teacher's outputs; whether that licence binds it is for you to find out."
        if taught
        else "That of the student it was trained from."
    )
    text = TEXT.format(
        name=config.run_name,
        how=how,
        table=_table(scores),
        facts="\n".join(f"- {name}: {value}" for name, value in facts.items() if value),
        command=shlex.join(["python", *sys.argv]),
        licence=licence,
    )
    ModelCard(f"---\n{head.to_yaml()}\n---\n{text}").save(export / "README.md")
    if config.export.push_to_hub is not None:
        push(export, config.export.push_to_hub)


def licence_of(directory: Path) -> str | None:
    """The licence that a model directory tells: its card's, else the first line of a file LICENSE."""
    card = directory / "README.md"
    try:
        found: dict[str, Any] = (metadata_load(card) or {}) if card.is_file() else {}
    except Exception:  # a card that is no YAML tells nothing
        found = {}
    named = found.get("license_name") or found.get("license")
    files = [] if named else sorted(directory.glob("LICENSE*"))
    lines = files[0].read_text(encoding="utf-8", errors="replace").split("\n") if files else []
    return str(named) if named else next((line.strip() for line in lines if line.strip()), None)


def push(export: Path, repository: str) -> None:
    """Upload an export; the repository is made, private, where there is none.

    What goes wrong is a warning: the export is there, and may be uploaded by hand.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(folder_path=export, repo_id=repository, commit_message="Student of a GRPO-KD run")
        print(f"uploaded: {done}", flush=True)
    except Exception as error:  # of a network or the hub
        reason = " ".join(str(error).split())[:300]
        by_hand = f"`hf upload {repository} {export}` does it by hand"
        log.warning("export.push_to_hub = %r: not uploaded (%s); %s", repository, reason, by_hand)


def _named(directory: Path) -> str:
    """A model as the world knows it, without this machine's paths."""
    return hub_id(directory) or "/".join(directory.parts[-2:])


def _data(path: str) -> str:
    """A file's name, or a hub id."""
    return Path(path).name if Path(path).exists() else path


def _table(scores: Scores) -> str:
    keys = list(dict.fromkeys(key for one in scores.values() for key in one))
    shown = {key: HELDOUT.get(key, (key.replace("_", " "), "", 3)) for key in keys}
    lines = ["| | " + " | ".join(title for title, _, _ in shown.values()) + " |"]
    lines.append("| --- |" + " ---: |" * len(keys))
    for name, one in scores.items():
        cells = [f"{one[key]:.{digits}f}" if key in one else "" for key, (_, _, digits) in shown.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
