"""The programs that an experiment starts: a signal to the experiment reaches them, and they write a checkpoint."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOPPED = 75
"""Exit code of an experiment that a signal has ended; the same command goes on."""
Child = subprocess.Popen[bytes]


@contextmanager
def handing_on(running: Callable[[], Iterable[Child]]) -> Iterator[threading.Event]:
    """A block in which INT, TERM, USR1 and HUP to this process are handed to those running as TERM; what it gives is
    set from then on. A HUP that `nohup` has switched off stays so."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        for child in running():
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    former = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield stopped
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def start(line: Sequence[str], folder: Path, log: Path | None = None) -> Child:
    """One program with `folder` as working directory, what it prints at the end of `log`. It has a group of its own, so
    that Ctrl-C reaches it once, through us."""
    out = None if log is None else log.open("ab")
    try:
        return subprocess.Popen(
            line, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    finally:
        if out is not None:
            out.close()


def run(line: Sequence[str], folder: Path, log: Path | None = None) -> int:
    """The exit code of one program at its end. Raises SystemExit where a signal came meanwhile."""
    children: list[Child] = []
    with handing_on(lambda: children) as stopped:
        if not stopped.is_set():
            children.append(start(line, folder, log))
            if stopped.is_set():
                children[0].send_signal(signal.SIGTERM)
        code = children[0].wait() if children else STOPPED
    if stopped.is_set():
        raise SystemExit(STOPPED)
    return code
