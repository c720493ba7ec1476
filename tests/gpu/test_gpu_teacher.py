"""The teacher server on CUDA, one rank a GPU, against transformers in float32 on the CPU with the same weights.

float32: the order of sums. bfloat16: the server rounds each operation to 8 bits, of weights that are wilder than any
trained model's; held to twice the limit of sampled log-probabilities, as a mean over tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inference.attention.packing import groups_of
from inference.client import TeacherClient
from tests.gpu.device import GROUP, ON_DEVICE, PROMPTS, RESPONSES
from tests.support.teacher_models import build, reference_logits, save_tokenizer
from tests.support.teacher_servers import SECRET, serve

pytestmark = ON_DEVICE
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
ENDS = (2,)


@pytest.mark.parametrize(
    ("kind", "dtype", "tensor_parallel"),
    [
        ("llama", "float32", 1), ("llama", "bfloat16", 1), ("gemma3", "float32", 1), ("gemma3", "bfloat16", 1),
        ("gpt2", "float32", 1), ("llama", "float32", 2), ("llama", "bfloat16", 2),
    ],
)  # fmt: skip
def test_scores_and_answers_are_those_of_transformers(
    kind: str, dtype: str, tensor_parallel: int, tmp_path: Path
) -> None:
    """Tensor-parallel 2 on one GPU too: ranks that share it speak through the host."""
    model = build(kind, tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    for parameter in model.parameters() if dtype == "bfloat16" else ():
        parameter.data = parameter.data.to(torch.bfloat16).float()  # what the server will read
    address_file, log = tmp_path / "address", tmp_path / "log"
    server = serve(
        tmp_path / "model", address_file, log, "--dtype", dtype, tensor_parallel=tensor_parallel,
    )  # fmt: skip
    try:
        address = address_file.read_text().strip()
        client = TeacherClient(address, secret=SECRET, tokenizer_fingerprint=None, timeout_s=60.0)
        groups = groups_of(PROMPTS, RESPONSES, GROUP)
        score = client.score(groups).result(60)
        hidden = client.hidden(groups).result(60)
        answers = client.generate(PROMPTS, max_new_tokens=8, eos_ids=ENDS).result(60)
        client.close()
    finally:
        server.kill()
        server.wait()
    logits = [reference_logits(model, PROMPTS[b // GROUP], r) for b, r in enumerate(RESPONSES)]
    labels_S = torch.tensor([t for r in RESPONSES for t in r])
    want_S = torch.cat(logits).log_softmax(-1).gather(-1, labels_S[:, None])[:, 0]
    gap_S = (score - want_S).abs()
    assert float(gap_S.mean()) <= TOLERANCE[dtype], log.read_text()[-2000:]
    output = model.get_output_embeddings().weight.detach().float()
    again_S = (hidden.float() @ output.T).log_softmax(-1).gather(-1, labels_S[:, None])[:, 0]
    assert float((again_S - want_S).abs().mean()) <= TOLERANCE[dtype]
    if dtype == "float32":
        assert answers == [greedy(model, prompt) for prompt in PROMPTS]


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """transformers' likeliest answer, a token at a time."""
    tokens = list(prompt)
    for _ in range(8):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in ENDS:
            break
    return tuple(tokens[len(prompt) :])
