"""Every family, tensor-parallel over 1, 2 and 4 processes, against Hugging Face's own forward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inference.model.output_layer import load_output_layer, logit_softcap
from tests.support.forked import Forked
from tests.support.runs import free_port
from tests.support.teacher_models import BUILDERS, VOCAB, build, reference_logits
from tests.support.teacher_ranks import GROUPS, PROMPTS

SCRIPT = Path(__file__).parents[1] / "support" / "teacher_ranks.py"
LABELS = torch.tensor([token for group in GROUPS for response in group.responses for token in response])
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    root = tmp_path_factory.mktemp("models")
    return {kind: (build(kind, root / kind), root / kind) for kind in BUILDERS}


def run_ranks(size: int, jobs: list[str], out: Path, timeout: float = 180) -> dict[str, torch.Tensor]:
    """Rank 0's answers."""
    port = free_port()
    command = [sys.executable, str(SCRIPT)]
    logs = [out.with_name(f"rank{r}.log") for r in range(size)]
    ranks = [Forked([*command, str(r), str(size), port, str(out), *jobs], log, log) for r, log in enumerate(logs)]
    try:
        codes = [rank.wait(timeout) for rank in ranks]
        assert codes == [0] * size, "\n".join(log.read_text()[-2000:] for log in logs)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return load_file(out)


Run = Callable[[int], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def run(models: dict[str, tuple[Any, Path]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What so many ranks said of all models; each size is started once."""

    @cache
    def run(size: int) -> dict[str, torch.Tensor]:
        jobs = [f"{kind}={path}" for kind, (_, path) in models.items()]
        if size < 4:
            jobs.append(f"llama-bfloat16={models['llama'][1]}")
        return run_ranks(size, jobs, tmp_path_factory.mktemp("ranks") / "answers.safetensors")

    return run


@pytest.fixture(scope="module", params=[1, 2])
def answers(request: pytest.FixtureRequest, run: Run) -> dict[str, torch.Tensor]:
    """Every request, on 1 and 2 ranks."""
    return run(request.param)


@pytest.fixture(scope="module", params=[1, 2, 4])
def scores(request: pytest.FixtureRequest, run: Run) -> dict[str, torch.Tensor]:
    """Scores and hidden states, also on more ranks than KV heads."""
    return run(request.param)


def logits(model: Any) -> torch.Tensor:
    """[S, V] in batch order."""
    return torch.cat([reference_logits(model, g.prompt, response) for g in GROUPS for response in g.responses])


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("request_", ["packed/score", "whole/score", "whole/plain"])
def test_log_probabilities(
    models: dict[str, tuple[Any, Path]], scores: dict[str, torch.Tensor], kind: str, request_: str
) -> None:
    expected = logits(models[kind][0]).log_softmax(-1)[torch.arange(len(LABELS)), LABELS]
    got = scores[f"{kind}/{request_}/0"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", BUILDERS)
def test_the_temperature_divides_the_logits(
    models: dict[str, tuple[Any, Path]], answers: dict[str, torch.Tensor], kind: str
) -> None:
    expected = (logits(models[kind][0]) / 0.5).log_softmax(-1)[torch.arange(len(LABELS)), LABELS]
    torch.testing.assert_close(answers[f"{kind}/whole/cooler/0"], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", BUILDERS)
def test_top_k(models: dict[str, tuple[Any, Path]], answers: dict[str, torch.Tensor], kind: str) -> None:
    warm = logits(models[kind][0]) / 2.0
    values, ids = (answers[f"{kind}/packed/topk/{i}"] for i in range(2))
    torch.testing.assert_close(values, warm.log_softmax(-1).topk(60).values, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(warm.log_softmax(-1).gather(1, ids), values, rtol=0, atol=TOLERANCE)
    # What is left after the K entries is the tail's mass, exactly: nothing of it is padding.
    tail = 1 - warm.softmax(-1).gather(1, ids).sum(-1)
    torch.testing.assert_close(1 - values.exp().sum(-1), tail, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", BUILDERS)
def test_hidden_states_give_the_same_distribution(
    models: dict[str, tuple[Any, Path]], scores: dict[str, torch.Tensor], kind: str
) -> None:
    model, path = models[kind]
    layer = load_output_layer(path)
    assert layer.shape == (VOCAB, 48)
    made, cap = scores[f"{kind}/packed/hidden/0"] @ layer.T, logit_softcap(path)
    got = (made if cap is None else cap * torch.tanh(made / cap)).log_softmax(-1)
    torch.testing.assert_close(got, logits(model).log_softmax(-1), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", BUILDERS)
def test_greedy_answers_are_hugging_faces(
    models: dict[str, tuple[Any, Path]], answers: dict[str, torch.Tensor], kind: str
) -> None:
    model = models[kind][0]
    expected: list[int] = []
    for group in PROMPTS:
        ids = list(group.prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected += ids[len(group.prompt) :]
    assert answers[f"{kind}/whole/greedy/0"].tolist() == [8] * 3
    assert answers[f"{kind}/whole/greedy/1"].tolist() == expected


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_sampling_does_not_depend_on_batching(answers: dict[str, torch.Tensor], kind: str) -> None:
    lengths, tokens = answers[f"{kind}/packed/sampled/0"], answers[f"{kind}/packed/sampled/1"]
    assert answers[f"{kind}/whole/sampled/0"].tolist() == lengths.tolist()
    assert answers[f"{kind}/whole/sampled/1"].tolist() == tokens.tolist()
    assert len(lengths) == 9
    for response in tokens.split(lengths.tolist()):
        ends = [i for i, token in enumerate(response.tolist()) if token in (2, 3, 4)]
        assert ends in ([], [len(response) - 1])
        assert ends or len(response) == 9


def test_bfloat16_is_close(models: dict[str, tuple[Any, Path]], answers: dict[str, torch.Tensor]) -> None:
    expected = logits(models["llama"][0]).log_softmax(-1)[torch.arange(len(LABELS)), LABELS]
    got = answers["llama-bfloat16/packed/score/0"]
    assert got.dtype == torch.float32
    assert answers["llama-bfloat16/packed/hidden/0"].dtype == torch.bfloat16
    # Weights of std 0.15 over 48 inputs: bfloat16's 8 bits leave a few hundredths of a nat.
    assert (got - expected).abs().mean() < 0.1
