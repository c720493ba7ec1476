"""Tensor-parallel ranks for a test: load each model, run the requests, leave rank 0's answers in a file.

    python tests/support/teacher_ranks.py RANK SIZE PORT OUT.safetensors [--groups FILE] NAME=MODEL_DIR ...

With 4 ranks only the requests that cost few collectives: gloo is slow on fewer cores than ranks.
--groups FILE (JSON, [[prompt, [response, ...]], ...]) scores these in place of the fixed ones, and decodes each prompt
greedily for 24 tokens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from inference.attention.packing import Group
from inference.model.scoring import Scorer
from inference.model.teacher import Teacher
from inference.protocol.wire import Request

GROUPS = (
    Group((5, 6, 7, 8, 9, 10, 11), ((12, 13, 14, 15, 16, 17, 18, 19), (), (20,), (21, 2)), 0),
    Group((50,), ((100, 99, 98, 1),), 4),
    Group((3, 4, 5, 60, 61, 62, 63, 64, 65, 66, 67, 68), ((70, 71, 72), (73,)), 5),
)
"""Lengths 0, 1 and more; a prompt of one token; the last vocabulary id."""
PLAIN = tuple(
    Group(group.prompt, (response,), group.first_response + i)
    for group in GROUPS
    for i, response in enumerate(group.responses)
)
"""The same, each response with a copy of its prompt."""
PROMPTS = tuple(Group(group.prompt, ()) for group in GROUPS)
REQUESTS = {
    "score": Request("score", GROUPS),
    "plain": Request("score", PLAIN),
    "cooler": Request("score", GROUPS, temperature=0.5),
    "hidden": Request("hidden", GROUPS),
    "topk": Request("topk", GROUPS, temperature=2.0, k=60),
    "greedy": Request("answer", PROMPTS, 0.0, max_new_tokens=8),
    "sampled": Request("answer", PROMPTS * 3, 1.0, max_new_tokens=9, seed=7, ids=(2, 3, 4)),
}
PACKED = ("score", "hidden", "topk", "sampled")
WHOLE = ("score", "plain", "cooler", "greedy", "sampled")
FEW = ("score", "plain", "hidden")


def ask(scorer: Scorer, request: Request) -> list[torch.Tensor]:
    """As the engine does."""
    return getattr(scorer, request.kind)(request)


def fixed(teacher: Teacher, size: int) -> dict[str, torch.Tensor]:
    """The requests above, in small rows and chunks, so that every request is cut into several, and whole."""
    answers = {}
    for what, names, scorer in (
        ("packed", PACKED, Scorer(teacher, max_batch_tokens=24, logit_chunk=4)),
        ("whole", WHOLE, Scorer(teacher, max_batch_tokens=1000, logit_chunk=1000)),
    ):
        for name in [n for n in names if size < 4 or n in FEW]:
            answers |= {f"{what}/{name}/{i}": tensor for i, tensor in enumerate(ask(scorer, REQUESTS[name]))}
    return answers


def from_file(teacher: Teacher, file: Path) -> dict[str, torch.Tensor]:
    """Scores of the groups in a file, and greedy answers to their prompts."""
    groups = []
    for prompt, responses in json.loads(file.read_text()):
        first = sum(len(group.responses) for group in groups)
        groups.append(Group(tuple(prompt), tuple(tuple(response) for response in responses), first))
    scorer = Scorer(teacher, max_batch_tokens=1024, logit_chunk=256)
    (score,) = scorer.score(Request("score", tuple(groups)))
    prompts = tuple(Group(group.prompt, ()) for group in groups)
    lengths, tokens = scorer.answer(Request("answer", prompts, 0.0, max_new_tokens=24))
    return {"score": score, "lengths": lengths, "tokens": tokens}


def main() -> None:
    rank, size, port, out = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    arguments = sys.argv[5:]
    file = Path(arguments[1]) if arguments[0] == "--groups" else None
    answers: dict[str, torch.Tensor] = {}
    for argument in arguments[2:] if file else arguments:
        name, _, directory = argument.partition("=")
        dtype = "bfloat16" if name.endswith("bfloat16") else "float32"
        teacher = Teacher(Path(directory), dtype)
        for what, tensor in (from_file(teacher, file) if file else fixed(teacher, size)).items():
            answers[f"{name}/{what}"] = tensor.contiguous()
    if rank == 0:
        save_file(answers, out)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
