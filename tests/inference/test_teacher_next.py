"""`next`: token by token against a cache that the server holds, and what happens when that is lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.attention.packing import Group
from inference.client import TeacherClient, TeacherDecoding, TeacherRefused
from inference.model.output_layer import load_output_layer
from tests.support.teacher_models import build, reference_logits, save_tokenizer
from tests.support.teacher_servers import SECRET, serve_forked

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12]]
SAMPLES = 2
CHOSEN = [[20, 21, 22, 23], [30], [31, 32, 33, 34], [40, 41], [42, 43, 44, 45], [46, 47, 48]]
"""What the caller chooses for each response; a shorter one has ended earlier."""
GROUPS = [Group((5, 6), ((7,),))]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("teacher") / "tiny"
    model = build("gemma3", directory)  # windows: the cache is older than they reach
    save_tokenizer(directory)
    return model, directory


@pytest.fixture(scope="module")
def address(model: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two ranks that hold one decoding of these prompts at a time (8 prompt tokens + 6 * 5), in rows of 6 tokens."""
    work = tmp_path_factory.mktemp("work")
    flags = ("--max_cache_tokens", "50", "--max_batch_tokens", "6")
    process = serve_forked(model[1], work / "teacher.address", work / "log", *flags, tensor_parallel=2)
    yield str(work / "teacher.address")
    process.terminate()
    assert process.wait(60) == 0


def connect(address: str, **settings: Any) -> TeacherClient:
    return TeacherClient(address, secret=SECRET, tokenizer_fingerprint=None, timeout_s=60, **settings)


def growing(step: int) -> list[int]:
    """The responses that have `step` tokens."""
    return [b for b, chosen in enumerate(CHOSEN) if len(chosen) >= step]


def check(step: int, got: torch.Tensor, model: tuple[Any, Path]) -> None:
    """Against Hugging Face: what follows the first `step` chosen tokens."""
    logits = [
        reference_logits(model[0], tuple(PROMPTS[b // SAMPLES]), (*CHOSEN[b][:step], 0))[-1] for b in growing(step)
    ]
    mine = (got @ load_output_layer(model[1]).T).log_softmax(-1)
    torch.testing.assert_close(mine, torch.stack(logits).log_softmax(-1), rtol=0, atol=TOLERANCE)


def steps(decoding: TeacherDecoding) -> Iterator[torch.Tensor]:
    """The answers of all steps, one after the other."""
    yield decoding.first.result(60)
    for step in range(4):
        rows = growing(step + 1)
        yield decoding.next(rows, [CHOSEN[b][step] for b in rows]).result(60)


def test_each_step_is_hugging_faces_distribution(address: str, model: tuple[Any, Path]) -> None:
    with connect(address) as client:
        decoding = client.decode(PROMPTS, samples=SAMPLES, max_new_tokens=5)
        for step, got in enumerate(steps(decoding)):
            check(step, got, model)
        decoding.close().result(30)


def test_two_clients_that_push_each_other_out_get_the_right_answers(address: str, model: tuple[Any, Path]) -> None:
    with connect(address) as one, connect(address) as other:
        decodings = [c.decode(PROMPTS, samples=SAMPLES, max_new_tokens=5) for c in (one, other)]
        for step, pair in enumerate(zip(*(steps(decoding) for decoding in decodings), strict=True)):
            for got in pair:
                check(step, got, model)


def test_what_cannot_be(address: str) -> None:
    with connect(address) as client:
        decoding = client.decode(PROMPTS, samples=SAMPLES, max_new_tokens=1)
        decoding.first.result(30)
        decoding.next([0, 2], [3, 3]).result(30)
        with pytest.raises(ValueError, match="left out of an earlier step"):
            decoding.next([1], [3])
        with pytest.raises(TeacherRefused, match="step: 2"):
            decoding.next([0], [3]).result(30)
        with pytest.raises(TeacherRefused, match="max_cache_tokens"):
            client.decode(PROMPTS, samples=40, max_new_tokens=5).first.result(30)
        client.score(GROUPS).result(30)


def test_a_decoding_survives_its_server_and_replicas_take_over(
    model: tuple[Any, Path], address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = str(tmp_path / "a.address")
    server = serve_forked(model[1], Path(other), tmp_path / "log")
    both = f"{other}, {address}"
    try:
        with connect(both, prefer=2) as first, connect(both, prefer=1) as second:
            assert (first._connector.address, second._connector.address) == (other, address)
            decodings = [c.decode(PROMPTS, samples=SAMPLES, max_new_tokens=5) for c in (first, second)]
            for step, pair in enumerate(zip(*(steps(decoding) for decoding in decodings), strict=True)):
                for got in pair:
                    check(step, got, model)
                if step == 1:
                    server.kill()
            assert second._connector.address == first._connector.address == address
        said = (Path(address).parent / "log").read_text()  # there is room for one of the two
        assert "38 tokens of one session are dropped for another's 38" in said
        (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert f"teacher at {other} was lost" in line
        assert f"asking {address}" in line
    finally:
        server.kill()
        server.wait()


def test_a_replica_with_another_model_is_refused(model: tuple[Any, Path], address: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build("gemma3", other, seed=1)
    save_tokenizer(other)
    server = serve_forked(other, tmp_path / "a.address", tmp_path / "log")
    try:
        with connect(f"{tmp_path / 'a.address'},{address}") as client:
            client.score(GROUPS).result(30)
            server.kill()
            server.wait()
            with pytest.raises(TeacherRefused, match="another teacher"):
                client.score(GROUPS).result(120)
    finally:
        server.kill()
        server.wait()
