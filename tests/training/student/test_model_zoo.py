"""Every family of docs/models.md as a student: what is computed is what transformers computes, or it is refused."""

from __future__ import annotations

import re

import pytest

from tests.support.model_zoo import FAMILIES, ROOT, Found, try_student

DOCS = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_right_or_refused(family: str) -> None:
    found = try_student(family)
    row = re.search(rf"^\| {re.escape(family)} \| \w+ \| (.*) \| (.*) \|$", DOCS, re.MULTILINE)
    assert row is not None, "write the table anew: python -m tests.support.model_zoo"
    if found.gap is None:
        assert (row[1], row[2]) == ("-", "refused")
    else:
        assert row[1] == found.way
        assert found.gap < 1e-4
        assert float(row[2]) < 1e-4


def test_what_is_refused_says_why() -> None:
    """BERT looks ahead: no way of running it agrees."""
    found = try_student("bert")
    assert found == Found(found.way, None)
    assert re.match(r"student.path = 'bert': BertLMHeadModel cannot be trained here: its log-probabilities", found.way)
