"""`next`: token by token against a cache that the server holds, and what happens when that is lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.client import TeacherClient, TeacherDecoding, TeacherRefused
from inference.output_layer import load_output_layer
from inference.replies import TeacherNext
from tests.teacher_models import VOCAB, build, reference_logits, save_tokenizer
from tests.teacher_servers import SECRET, serve

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12]]
SAMPLES = 2
CHOSEN = [[20, 21, 22, 23], [30], [31, 32, 33, 34], [40, 41], [42, 43, 44, 45], [46, 47, 48]]
"""What the caller chooses for each response; a shorter one has ended earlier."""
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
    process = serve(model[1], work / "teacher.address", work / "log", *flags, tensor_parallel=2)
    yield str(work / "teacher.address")
    process.terminate()
    assert process.wait(15) == 0


def connect(address: str, **settings: Any) -> TeacherClient:
    return TeacherClient(address, secret=SECRET, tokenizer_fingerprint=None, timeout_s=60, **settings)


def expected(model: Any, rows: Sequence[int], step: int, temperature: float = 1.0) -> torch.Tensor:
    """float32 [A, V] from Hugging Face: what follows the first `step` chosen tokens."""
    logits = [
        reference_logits(model, tuple(PROMPTS[b // SAMPLES]), (*CHOSEN[b][:step], 0))[-1] / temperature for b in rows
    ]
    return torch.stack(logits).log_softmax(-1)


def steps(decoding: TeacherDecoding) -> Iterator[TeacherNext]:
    """The answers of all steps, one after the other."""
    yield decoding.first.result(60)
    for step in range(4):
        rows = [b for b, chosen in enumerate(CHOSEN) if len(chosen) > step]
        yield decoding.next(rows, [CHOSEN[b][step] for b in rows]).result(60)


def test_each_step_is_hugging_faces_distribution(address: str, model: tuple[Any, Path]) -> None:
    with connect(address) as client:
        everything = client.decode(PROMPTS, samples=SAMPLES, max_new_tokens=5, k=VOCAB, temperature=0.7)
        for step, got in enumerate(steps(everything)):
            want = expected(model[0], got.rows_A.tolist(), step, 0.7)
            torch.testing.assert_close(got.whole(VOCAB), want, rtol=0, atol=TOLERANCE)
        some = client.decode(PROMPTS, samples=SAMPLES, max_new_tokens=5, k=5)
        states = []
        for step, got in enumerate(steps(some)):
            want = expected(model[0], got.rows_A.tolist(), step)
            torch.testing.assert_close(got.logprobs_AK, want.topk(5).values, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(want.gather(1, got.ids_AK), got.logprobs_AK, rtol=0, atol=TOLERANCE)
            states.append(got.logsumexp_A)
        assert all(torch.isfinite(state).all() for state in states)
        some.close().result(30)


def test_hidden_states_in_place_of_entries(address: str, model: tuple[Any, Path]) -> None:
    layer = load_output_layer(model[1])
    with connect(address) as client:
        for step, got in enumerate(steps(client.decode(PROMPTS, samples=SAMPLES, max_new_tokens=5))):
            want = expected(model[0], got.rows_A.tolist(), step)
            torch.testing.assert_close((got.hidden_AH @ layer.T).log_softmax(-1), want, rtol=0, atol=TOLERANCE)


def test_two_clients_that_push_each_other_out_get_the_right_answers(address: str, model: tuple[Any, Path]) -> None:
    with connect(address) as one, connect(address) as other:
        decodings = [c.decode(PROMPTS, samples=SAMPLES, max_new_tokens=5, k=VOCAB) for c in (one, other)]
        for step, pair in enumerate(zip(*(steps(decoding) for decoding in decodings), strict=True)):
            for got in pair:
                want = expected(model[0], got.rows_A.tolist(), step)
                torch.testing.assert_close(got.whole(VOCAB), want, rtol=0, atol=TOLERANCE)


def test_what_cannot_be(address: str) -> None:
    with connect(address) as client:
        decoding = client.decode(PROMPTS, samples=SAMPLES, max_new_tokens=1, k=5)
        decoding.first.result(30)
        decoding.next([0, 2], [3, 3]).result(30)
        with pytest.raises(ValueError, match="left out of an earlier step"):
            decoding.next([1], [3])
        with pytest.raises(TeacherRefused, match="step: 2"):
            decoding.next([0], [3]).result(30)
        with pytest.raises(TeacherRefused, match="max_cache_tokens"):
            client.decode(PROMPTS, samples=40, max_new_tokens=5).first.result(30)
        client.ping().result(30)


def test_a_decoding_survives_its_server_and_replicas_take_over(
    model: tuple[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [tmp_path / f"{name}.address" for name in "ab"]
    log = tmp_path / "log"
    servers = [
        serve(model[1], files[0], log, wait=False),
        serve(model[1], files[1], log),
    ]
    both = f"{files[0]}, {files[1]}"
    try:
        while not files[0].is_file():
            assert servers[0].poll() is None
        with connect(both, prefer=2) as first, connect(both, prefer=1) as second:
            assert (first.address, second.address) == (str(files[0]), str(files[1]))
            decodings = [c.decode(PROMPTS, samples=SAMPLES, max_new_tokens=5, k=VOCAB) for c in (first, second)]
            for step, pair in enumerate(zip(*(steps(decoding) for decoding in decodings), strict=True)):
                for got in pair:
                    want = expected(model[0], got.rows_A.tolist(), step)
                    torch.testing.assert_close(got.whole(VOCAB), want, rtol=0, atol=TOLERANCE)
                if step == 1:
                    servers[0].kill()
            assert second.address == first.address == str(files[1])
        (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert f"teacher at {files[0]} was lost" in line
        assert f"asking {files[1]}" in line
    finally:
        for server in servers:
            server.kill()
            server.wait()


def test_a_replica_with_another_model_is_refused(model: tuple[Any, Path], address: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build("gemma3", other, seed=1)
    save_tokenizer(other)
    server = serve(other, tmp_path / "a.address", tmp_path / "log")
    try:
        with connect(f"{tmp_path / 'a.address'},{address}") as client:
            client.ping().result(30)
            server.kill()
            server.wait()
            with pytest.raises(TeacherRefused, match="another teacher"):
                client.ping().result(30)
    finally:
        server.kill()
        server.wait()
