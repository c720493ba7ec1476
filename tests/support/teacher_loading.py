"""One rank that loads a model and says what that cost: a JSON line with bytes of the shard and of memory.

python tests/support/teacher_loading.py RANK SIZE PORT MODEL_DIR
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

from inference.model.teacher import Teacher
from tests.support.teacher_servers import memory_kib


def main() -> None:
    rank, size, port = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    before = memory_kib(os.getpid())
    teacher = Teacher(Path(sys.argv[4]), "float32")
    shard = sum(p.numel() * p.element_size() for p in teacher.model.parameters())
    peak, after = memory_kib(os.getpid(), "VmHWM"), memory_kib(os.getpid())
    print(json.dumps({"shard": shard, "before": before * 1024, "peak": peak * 1024, "after": after * 1024}), flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
