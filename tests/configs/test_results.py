"""configs/io/results.py: what is written is read, and what is no result is refused in one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from configs.io.results import Result, Value, read_result

RESULT = Result(
    measure="heldout",
    model="runs/a/export",
    data={"path": "h.jsonl", "sha256": "0f", "rows": 2},
    settings={"max_new_tokens": 8},
    versions={"torch": "2.9"},
    values={"f1": Value(50.0, 0.0, 100.0), "exact_match": Value(0.0)},
    rows=[{"id": "a", "prediction": "Tórshavn"}, {"id": "b", "prediction": ""}],
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    RESULT.write(tmp_path / "eval" / "heldout.json")
    content = json.loads((tmp_path / "eval" / "heldout.json").read_text(encoding="utf-8"))
    assert content["format"] == 1
    assert content["values"]["f1"] == {"value": 50.0, "low": 0.0, "high": 100.0}
    assert read_result(tmp_path / "eval" / "heldout.json") == RESULT
    other = replace(RESULT, measure="pairs", values={"r": Value(math.nan)})
    other.write(tmp_path / "eval" / "pairs.json")
    assert math.isnan(read_result(tmp_path / "eval" / "pairs.json").values["r"].value)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"f1": 50.0}),
        json.dumps({"format": 2, "measure": "x"}),
        json.dumps({"format": 1, "measure": "x", "values": {}}),
        json.dumps({"format": 1, "values": {"f1": 50.0}}),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "old.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"old\.json: not a result of format 1 \(.*\); delete it and measure again$"):
        read_result(file)
