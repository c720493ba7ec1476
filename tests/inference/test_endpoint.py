"""A teacher that vLLM or SGLang serves: what it says is what transformers says of the same model, and its faults are
named. The server here speaks their documented protocols (tests/support/served_model.py); none of them was run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import inference.model.endpoint as endpoint
from configs.models import TeacherConfig
from inference.attention.packing import Group
from inference.model.backend import check_teacher
from inference.model.endpoint import Endpoint
from inference.protocol.wire import Request, Unavailable, WireError
from tests.support.forked import finish_forked
from tests.support.runs import command, metrics
from tests.support.served_model import ServedModel
from tests.support.tiny_tokenizers import save_tiny
from training.data.demo.models import ensure_demo

CPU = torch.device("cpu")
GROUPS = (Group((5, 6, 7, 8), ((9, 10, 11), (), (12,)), 0), Group((9,), ((13, 14), (5, 6, 7, 8, 9)), 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("served"), "byte_level")


@pytest.fixture(params=["vllm", "sglang"])
def served(model: Path, request: pytest.FixtureRequest) -> Iterator[ServedModel]:
    with ServedModel(model, request.param) as server:
        yield server


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSE_S", 0.01)


def open_endpoint(served: ServedModel, path: Path, **settings: object) -> Endpoint:
    return Endpoint(TeacherConfig(path=str(path), url=served.url, **settings), CPU)  # type: ignore[arg-type]


@torch.no_grad()
def own(path: Path) -> torch.Tensor:
    """[S, V] transformers' log-probabilities before each response token."""
    model, out = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), []
    for group in GROUPS:
        for response in group.responses:
            logits = model(torch.tensor([[*group.prompt, *response]])).logits[0, len(group.prompt) - 1 : -1]
            out.append(logits.log_softmax(-1))
    return torch.cat(out)


@pytest.mark.parametrize("max_batch_tokens", [16384, 1])
def test_it_says_what_transformers_says(served: ServedModel, model: Path, max_batch_tokens: int) -> None:
    teacher, expected = open_endpoint(served, model, max_batch_tokens=max_batch_tokens), own(model)
    labels = torch.tensor([t for g in GROUPS for r in g.responses for t in r])
    (scores,) = teacher.score(Request("score", GROUPS))
    torch.testing.assert_close(scores, expected.gather(1, labels[:, None])[:, 0], atol=1e-5, rtol=0)
    values, ids = teacher.topk(Request("topk", GROUPS, k=5))
    best = expected.topk(5)
    assert torch.equal(ids, best.indices)
    torch.testing.assert_close(values, best.values, atol=1e-5, rtol=0)
    assert teacher.info.max_positions == 256  # the model's, which is below the server's
    assert not hasattr(teacher, "hidden")


def test_the_servers_context_has_to_take_what_the_server_adds(served: ServedModel, model: Path) -> None:
    """vLLM and SGLang refuse a scored row that fills it: they write one token behind it, and SGLang wants one free."""
    served.context = 100
    assert open_endpoint(served, model).info.max_positions == 98


def test_answers_end_with_what_ends_them(served: ServedModel, model: Path) -> None:
    teacher = open_endpoint(served, model)
    prompts = tuple(Group(g.prompt, ()) for g in GROUPS)
    free = Request("answer", prompts, temperature=0.0, max_new_tokens=6)
    lengths, tokens = teacher.answer(free)
    assert lengths.tolist() == [6, 6]
    first = tokens[:6].tolist()
    ends = (first[2],)
    lengths, tokens = teacher.answer(Request("answer", prompts, temperature=0.0, max_new_tokens=6, ids=ends))
    assert tokens[: int(lengths[0])].tolist() == first[: first.index(first[2]) + 1]


def test_a_server_that_comes_back_is_asked_again_and_one_that_stays_away_is_unavailable(
    served: ServedModel, model: Path
) -> None:
    teacher, request = open_endpoint(served, model), Request("score", GROUPS)
    (expected,) = teacher.score(request)
    turns = iter([(503, "loading"), (429, "slow down")])
    served.fault = lambda route, body: next(turns, None)
    assert torch.equal(teacher.score(request)[0], expected)
    served.fault = lambda route, body: (500, "out of\nmemory")
    with pytest.raises(Unavailable, match="status 500: out of memory"):
        teacher.score(request)


def test_what_it_refuses_and_what_is_no_answer_are_errors_of_the_request(served: ServedModel, model: Path) -> None:
    teacher, request = open_endpoint(served, model), Request("topk", GROUPS, k=64)
    served.fault = lambda route, body: (400, '{"message": "max allowed: 20"}')
    with pytest.raises(WireError, match=r"refuses .*: status 400: .*max allowed: 20"):
        teacher.topk(request)
    served.fault = lambda route, body: (200, '{"choices": [{"index": 0, "text": "no log-probabilities"}]}')
    with pytest.raises(WireError, match="gives no log-probabilities of a prompt's tokens"):
        teacher.topk(request)
    with pytest.raises(WireError, match="gives no token ids of its answers"):  # a vLLM that knows no return_token_ids
        teacher.answer(Request("answer", (Group((5, 6), ()),), max_new_tokens=2))
    with pytest.raises(WireError, match=r"temperature = 0\.5"):
        teacher.score(Request("score", GROUPS, temperature=0.5))


def test_mistakes_in_the_settings_are_named(model: Path, tmp_path: Path) -> None:
    def refused(**settings: object) -> str:
        config = TeacherConfig(**{"path": str(model), **settings})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^teacher\.\w+ = ") as error:
            (check_teacher(config), Endpoint(config, CPU))
        return str(error.value)

    with ServedModel(model, names=("a", "b")) as served:
        assert "it serves a, b; name one" in refused(url=served.url)
        assert "it serves a, b" in refused(url=served.url, served_name="c")
    with ServedModel(model, names=()) as served:
        assert "it serves nothing; name one" in refused(url=served.url)
    with ServedModel(model, names=("a", "b")) as served:
        other = save_tiny(tmp_path / "other", "byte_level")
        (other / "tokenizer.json").write_text((model / "tokenizer.json").read_text().replace("ø", "o"))
        served.fault = lambda route, body: (404, "{}") if route == "/tokenize" else (401, "no key")
        assert "status 401: no key" in refused(url=served.url, served_name="a")
    assert "/v1/models is not answered" in refused(url=served.url)
    assert "give the address of vLLM or SGLang" in refused(url="localhost:8000")
    assert "give the address of vLLM or SGLang" in refused(backend="openai")
    assert "is not for teacher.backend megatron" in refused(url=served.url, backend="megatron")
    assert "no config.json in it" in refused(url=served.url, path=str(tmp_path))


def test_another_models_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path, "metaspace")
    with ServedModel(model) as served, pytest.raises(ValueError, match=r"teacher\.path = .* is not that of 'teacher'"):
        open_endpoint(served, other)


@pytest.fixture
def described(demo_cache: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The demo's teacher, and its directory without the weights."""
    teacher = ensure_demo(demo_cache, size="tiny").teacher
    shutil.copytree(teacher, tmp_path / "described", ignore=shutil.ignore_patterns("*.safetensors"))
    return teacher, tmp_path / "described"


def test_a_run_with_it_is_the_run_with_the_same_teacher_here(
    described: tuple[Path, Path], demo_cache: Path, tmp_path: Path, train: Callable[..., object]
) -> None:
    """minillm asks for what teacher_logprob does, and for the likeliest entries besides."""
    same = ["--steps", "2", "--loss.single_step_entries", "8", "--eval.questions", "2"]
    train(tmp_path / "here", *same)
    with ServedModel(described[0]) as served:
        there = ["--teacher.path", str(described[1]), "--teacher.url", served.url]
        finish_forked(command(tmp_path / "there", demo_cache, *same, *there))
    for here, there_too in zip(*(metrics(next((tmp_path / p).glob("grpo-*"))) for p in ("here", "there")), strict=True):
        for name in ("reward/mean", "kl/teacher", "loss/total", "grad_norm"):
            assert there_too[name] == pytest.approx(here[name], abs=1e-4), name


def test_what_needs_no_whole_distribution_runs_and_the_rest_is_refused(
    described: tuple[Path, Path], demo_cache: Path, tmp_path: Path
) -> None:
    with ServedModel(described[0], "sglang") as served:
        common = [
            "--teacher.path",
            str(described[1]),
            "--teacher.url",
            served.url,
            "--steps",
            "1",
            "--eval.questions",
            "2",
        ]
        finish_forked(command(tmp_path / "seqkd", demo_cache, *common, "--recipe", "seqkd"))
        done = finish_forked(command(tmp_path / "exact", demo_cache, *common), code=2)
        assert "so its whole distribution cannot be had; set loss.single_step_entries to 16" in done.stderr
        asked = [*common, "--loss.single_step_entries", "8", "--doctor"]
        done = finish_forked(command(tmp_path / "doctor", demo_cache, *asked))
        assert "not checked: the teacher's backend gives no hidden states" in done.stdout
        assert re.search(r"^KL reference +skipped: ", done.stdout, re.MULTILINE), done.stdout
        assert not (tmp_path / "doctor").exists(), "nothing is written"
