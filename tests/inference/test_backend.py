"""A backend of one's own behind the engine: the example of docs/teacher.md."""

from __future__ import annotations

import math
import re
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from configs.schema import TeacherConfig
from inference.attention.packing import Group
from inference.model.backend import BACKENDS
from inference.protocol.wire import Request, WireError
from inference.server.engine import Engine

PAGE = Path(__file__).resolve().parents[2] / "docs" / "teacher.md"


def test_the_example_of_the_documentation_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: None)  # one rank: nobody to reach
    (example,) = re.findall(r"```python\n# backend\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    with monkeypatch.context() as patch:
        patch.setitem(BACKENDS, "uniform", None)  # taken out again afterwards
        exec(compile(example, str(PAGE), "exec"), {})
        engine = Engine(BACKENDS["uniform"].load(TeacherConfig(backend="uniform"), torch.device("cpu")))
    score = engine.submit(Request("score", (Group((5, 6), ((7, 8), (9,))),)))
    answer = engine.submit(Request("answer", (Group((5,), ()), Group((6,), ())), max_new_tokens=3, ids=(2,)))
    with pytest.raises(WireError, match="has no 'hidden'"):
        engine.submit(Request("hidden", (Group((5,), ((6,),)),)))
    stopping = threading.Event()
    stopping.set()
    engine.run(stopping, lambda: 0)
    assert score.result(1)[0].tolist() == pytest.approx([-math.log(1000)] * 3)
    assert [tensor.tolist() for tensor in answer.result(1)] == [[1, 1], [2, 2]]
