"""What a program sees of itself, as JSON, and what one sees that it starts (tests/test_forked.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def seen() -> dict[str, Any]:
    """Nothing in it differs from one start to the next."""
    return {
        "name": __name__,
        "argv": sys.argv,
        "path": sys.path[0],
        "command": Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode().split("\0"),
        "folder": os.getcwd(),
        "parent": str(os.getppid()) == os.environ["GRPO_KD_PARENT"],
        "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "variables": [os.environ.get("RANK"), os.environ.get("GRPO_KD_GONE")],
        "interrupts": str(signal.getsignal(signal.SIGINT)),
        "input": sys.stdin.read(),
    }


if __name__ == "__main__":
    found = [seen()]
    if "--more" in sys.argv:
        done = subprocess.run(
            [sys.executable, "-u", __file__, "below"], input="to the one below", capture_output=True, text=True,
            process_group=0, env={**os.environ, "RANK": "1", "GRPO_KD_PARENT": str(os.getpid())},
        )  # fmt: skip
        found += [*json.loads(done.stdout), done.stderr, done.returncode]
    print(json.dumps(found))
    print("said", file=sys.stderr)
    if "--wait" in sys.argv:
        sys.stdout.flush()
        signal.pause()
    sys.exit(7)
