"""eval/measures/model.py: what a measure sees of other people's models and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.measures import model as module
from eval.measures.model import Model


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
    monkeypatch.setattr(module, "find_model", lambda key, path: cached if path == "org/name" else Path(path))
    tuned = adapter_on(tmp_path / "adapter", "org/name")
    found = []
    for content in ("old", "new"):
        (cached / "model.safetensors").write_text(content)
        found.append([Model(path=path).weights for path in ("org/name", str(cached), str(tuned))])
    assert found[0][0] == found[0][1] != found[1][0]
    assert len({found[0][0], found[0][2], found[1][2]}) == 3
