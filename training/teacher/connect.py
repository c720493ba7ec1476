"""A run's way to its teachers' servers: those that run somewhere already, and those that rank 0 starts."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path

from configs.checks import require
from configs.schema import TeacherConfig
from inference.client import TeacherClient
from inference.model.output_layer import output_layer_hash
from inference.protocol.fingerprint import tokenizer_fingerprint
from inference.protocol.replies import NONE
from inference.server.launch import SECRET, start_local_teacher
from training import distributed
from training.losses import Head
from training.teacher.facts import TeacherFacts
from training.teacher.link import TeacherLink

log = logging.getLogger(__name__)


def find_teacher(teacher: TeacherConfig, work_dir: Path, stack: ExitStack) -> tuple[str, str]:
    """Address and secret for every rank: a running server's, or those of one that rank 0 starts and takes down with
    `stack`, with its log in `work_dir`. Collective."""
    if teacher.address is not None:
        return teacher.address, os.environ.get(SECRET, "")
    local = distributed.by_main(lambda: start_local_teacher(teacher, Path(teacher.path), work_dir))
    found = ("", "") if local is None else (stack.enter_context(local).address, local.secret)
    address, secret, *_ = distributed.gather_strings(found)
    return address, secret


def connect(
    teacher: TeacherConfig,
    place: tuple[str, str],
    facts: TeacherFacts,
    stack: ExitStack,
    head: Head | None = None,
) -> TeacherLink:
    """This rank's session with the server at `place` (address, secret). `head`: see `TeacherLink`; left out where the
    server has no hidden states to give."""
    client = TeacherClient(
        place[0],
        secret=place[1],
        tokenizer_fingerprint=tokenizer_fingerprint(facts.path) if facts.same_tokenizer else None,
        timeout_s=teacher.timeout_s,
        prefer=distributed.rank(),
    )
    stack.callback(client.close)
    return TeacherLink(client, facts, head if "hidden" in client.info().kinds else None)


def check_served_model(key: str, teacher: TeacherConfig, link: TeacherLink) -> None:
    """A server that somebody started, perhaps anew since the run's last start, may serve another model than the setting
    `key` names. Raises ValueError; another type than the run's is a warning."""
    if teacher.address is None:
        return
    info = link.client.info()
    try:
        mine = output_layer_hash(link.facts.path)
    except ValueError:  # its weights are not here
        mine = NONE
    said = f"{teacher.address} serves another model, {info.model!r}: start that server with this one, or name its own"
    require(NONE in (mine, info.output_layer) or mine == info.output_layer, f"{key}.path", str(link.facts.path), said)
    if info.dtype != teacher.dtype and distributed.is_main():
        log.warning("%s.dtype = %r: %s computes in %s", key, teacher.dtype, teacher.address, info.dtype)
