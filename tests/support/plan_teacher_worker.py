"""One tensor-parallel rank of a real teacher, measured: shard bytes, and the peak of scoring full-length groups.

python tests/support/plan_teacher_worker.py RANK SIZE PORT PROMPT RESPONSES RESPONSE MODEL_DIR ...

Rank 0 prints a JSON line for each model. The last one is scored; the others load code.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist

from inference.attention.packing import Group
from inference.model.scoring import Scorer
from inference.model.teacher import Teacher
from inference.protocol.wire import Request
from tests.support.plan_worker import resident, settle

GROUPS = 4
MAX_BATCH_TOKENS = 1200


def main() -> None:
    """Load and score each model."""
    rank, size, port, prompt, responses, length = map(int, sys.argv[1:7])
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    answers = ((5,) * length,) * responses
    request = Request("score", tuple(Group((4,) * prompt, answers, n * responses) for n in range(GROUPS)))
    for directory in sys.argv[7:]:
        teacher = Teacher(Path(directory), "float32")
        scorer = Scorer(teacher, max_batch_tokens=MAX_BATCH_TOKENS, logit_chunk=256)
        scorer.score(Request("score", (Group((4, 5), ((5, 6),)),)))
        before = settle()
        if directory == sys.argv[-1]:
            scorer.score(request)
        peak = resident("VmHWM") - before
        shard = sum(p.numel() * p.element_size() for p in teacher.model.parameters())
        if rank == 0:
            print(json.dumps({"shard": shard, "peak": peak}), flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
