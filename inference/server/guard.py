"""What keeps a server standing that anybody can connect to: descriptors, and a log that nobody can flood."""

from __future__ import annotations

import logging
import os
import resource
import time

PERIOD_S = 60.0
"""Lines are counted over so long a time."""
MOST = 30
"""Lines of one kind that are logged in that time."""
FULL = 0.75
"""Share of the descriptors from which the server leaves in order; without any, torch would end it with SIGABRT."""


class Flood(logging.Filter):
    """Lets MOST lines of a kind through a minute, and says how many there were besides."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this line is logged. A kind is the line before its numbers and names are put in."""
        kind = str(record.msg)
        began, count = self._seen.get(kind, (record.created, 0))
        if record.created - began > PERIOD_S:
            if count > MOST:
                record.msg = f"{kind} (and {count - MOST} more like this in {record.created - began:.0f} s)"
            began, count = record.created, 0
        self._seen[kind] = (began, count + 1)
        return count < MOST


class Descriptors:
    """How many of this process's descriptors are in use. The limit is raised as far as the system lets us."""

    def __init__(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16
        if soft == resource.RLIM_INFINITY or soft >= self.most:
            self.most = soft if soft != resource.RLIM_INFINITY else self.most
        else:
            resource.setrlimit(resource.RLIMIT_NOFILE, (self.most, hard))
        self._looked = 0.0

    def problem(self) -> str | None:
        """What is wrong, in a line; looked at ten times a second."""
        if time.monotonic() - self._looked < 0.1:
            return None
        self._looked = time.monotonic()
        used = len(os.listdir("/proc/self/fd"))
        if used < FULL * self.most:
            return None
        return (
            f"{used} of {self.most} descriptors are in use: connections to this server's ports that say nothing stay "
            "open; keep the ports behind a firewall, or raise the limit (ulimit -n)"
        )
