"""The engine's queue: requests of several clients become one, and each client gets its own part back."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from inference.attention.packing import Group
from inference.protocol import wire
from inference.protocol.wire import Request, StateLost, WireError
from inference.server.engine import Engine


class Recorder:
    """A backend that writes down what it is asked and answers each response token with its own id."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def score(self, request: Request) -> list[torch.Tensor]:
        self.requests.append(request)
        return [torch.tensor([t for g in request.groups for r in g.responses for t in r], dtype=torch.int64)]

    hidden = score

    def topk(self, request: Request) -> list[torch.Tensor]:
        found = self.score(request)
        if 66 in found[0]:
            raise WireError("66 is refused")
        return found

    def next(self, request: Request) -> list[torch.Tensor]:
        self.requests.append(request)
        raise StateLost("gone")


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank: a broadcast has nobody to reach."""
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: None)


def serve(requests: list[Request]) -> tuple[Recorder, list[Any]]:
    """Queue all of them before the engine starts, then let it drain."""
    scorer, stopping = Recorder(), threading.Event()
    engine = Engine(scorer)  # type: ignore[arg-type]
    futures = [engine.submit(request) for request in requests]
    stopping.set()
    engine.run(stopping, lambda: 0)
    return scorer, futures


def score(first: int, length: int, temperature: float = 1.0, kind: str = "score") -> Request:
    """One prompt of `length` tokens with two responses, `first` and `first + 1`."""
    return Request(kind, (Group((9,) * length, ((first,), (first + 1,)), 0),), temperature)


def test_the_same_question_of_several_clients_is_asked_once(no_ranks: None) -> None:
    scorer, futures = serve([score(10, 5), score(20, 7, 0.5), score(30, 6), score(40, 4, kind="hidden")])
    assert [(r.kind, r.temperature, len(r.groups)) for r in scorer.requests] == [
        ("score", 1.0, 2),
        ("score", 0.5, 1),
        ("hidden", 1.0, 1),
    ]
    # Renumbered, so that a response of the second client is not taken for one of the first.
    assert [group.first_response for group in scorer.requests[0].groups] == [0, 2]
    assert [future.result(1)[0].tolist() for future in futures] == [[10, 11], [20, 21], [30, 31], [40, 41]]


def test_a_merge_keeps_to_its_budget_and_the_oldest_goes_first(no_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PART_TOKENS", 12)
    scorer, futures = serve([score(10, 8), score(20, 8), score(30, 4), score(40, 20)])
    # 8 + 4 tokens fit together, 8 + 8 do not; one that is too large by itself still runs.
    assert [[g.responses[0][0] for g in r.groups] for r in scorer.requests] == [[10, 30], [20], [40]]
    assert [future.result(1)[0].tolist() for future in futures] == [[10, 11], [20, 21], [30, 31], [40, 41]]


def test_decode_steps_are_never_merged_and_a_lost_one_stops_nobody(no_ranks: None) -> None:
    lost = Request("next", rows_A=(0,), ids=(5,))
    scorer, futures = serve([lost, score(10, 5), lost])
    assert [request.kind for request in scorer.requests] == ["next", "score", "next"]
    for future in (futures[0], futures[2]):
        with pytest.raises(StateLost):
            future.result(1)
    assert futures[1].result(1)[0].tolist() == [10, 11]


def test_what_is_refused_to_one_client_is_answered_to_the_others(no_ranks: None) -> None:
    _, futures = serve([score(10, 5, kind="topk"), score(66, 5, kind="topk"), score(30, 5, kind="topk")])
    with pytest.raises(WireError, match="66 is refused"):
        futures[1].result(1)
    assert [futures[n].result(1)[0].tolist() for n in (0, 2)] == [[10, 11], [30, 31]]


def test_what_a_backend_does_not_have_is_refused(no_ranks: None) -> None:
    with pytest.raises(WireError, match="backend has no 'answer'"):
        serve([Request("answer")])
