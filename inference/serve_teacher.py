"""Serve the teacher.

    GRPO_KD_TEACHER_SECRET=... python inference/serve_teacher.py --config configs/RUN.yaml [--teacher.port 29400]
    GRPO_KD_TEACHER_SECRET=... python inference/serve_teacher.py --path DIR --tensor_parallel 2 --address_file FILE
    python inference/serve_teacher.py --path DIR --tensor_parallel 2 --doctor

Takes the `teacher` section of a run's configuration, or its fields as flags. Started plainly it starts the other
tensor-parallel ranks itself; under torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) it is one of them. SIGTERM
and Ctrl-C finish what was asked and exit 0. The secret is read from the environment only. `--doctor` prints placement,
memory, a self-test and speed, and exits 0 if all is well; `--doctor_reference` also compares with transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from configs.schema import DEMO, TeacherConfig
from inference.checks import check_teacher

logger = logging.getLogger("teacher")

SECRET = "GRPO_KD_TEACHER_SECRET"
RANK, WORLD, STORE = "GRPO_KD_TEACHER_RANK", "GRPO_KD_TEACHER_WORLD", "GRPO_KD_TEACHER_STORE"
"""Environment of the ranks that a plainly started server starts."""
COLLECTIVE_S = 1800


def fail(message: str) -> NoReturn:
    """A user's mistake: one line, exit code 2."""
    print(f"serve_teacher: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse(argv: Sequence[str]) -> tuple[TeacherConfig, argparse.Namespace]:
    """The teacher's configuration, and the options of this process alone."""
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            fail(" ".join(message.split()) + " (--help lists every key)")

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config", type=Path)
    own.add_argument("--address_file", type=Path)
    own.add_argument("--exit_with_stdin", action="store_true")
    own.add_argument("--doctor", action="store_true")
    own.add_argument("--doctor_reference", action="store_true")
    options, rest = own.parse_known_args(argv)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(description=__doc__, default_env=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of a run; its `teacher` section is read")
    parser.add_argument("--address_file", help="file that gets host:port once the server is ready")
    parser.add_argument("--exit_with_stdin", action="store_true", help="exit when standard input ends")
    parser.add_argument("--doctor", action="store_true", help="examine the teacher, print what was found, exit")
    parser.add_argument("--doctor_reference", action="store_true", help="the same, against transformers' numbers too")
    parser.add_class_arguments(TeacherConfig, as_group=False)
    rest = _section(options.config) + [re.sub(r"^--teacher\.", "--", argument) for argument in rest]
    parsed = vars(parser.parse_args(rest))
    return TeacherConfig(**{field.name: parsed[field.name] for field in dataclasses.fields(TeacherConfig)}), options


def _section(file: Path | None) -> list[str]:
    """The `teacher` section of a run's YAML as flags; real flags come after and win."""
    if file is None:
        return []
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        section = (content or {}).get("teacher") or {}
        return [f"--{key}={'null' if value is None else value}" for key, value in section.items()]
    except (OSError, yaml.YAMLError, AttributeError) as error:
        fail(f"--config {file}: {' '.join(str(error).split())}")


def _examined(options: argparse.Namespace) -> bool:
    return options.doctor or options.doctor_reference


def check(config: TeacherConfig) -> None:
    """What can be told before anything is loaded."""
    if config.path == DEMO:
        raise ValueError("teacher.path = 'demo': the trainer builds the demo teacher; name its directory here")
    if config.interface in ("0.0.0.0", "::", ""):
        raise ValueError(f"teacher.interface = {config.interface!r}: name one address of this machine")
    check_teacher(Path(config.path), config.tensor_parallel)


def main(argv: Sequence[str]) -> int:
    """Start the ranks, serve, and clean up."""
    config, options = parse(argv)
    spawned = RANK in os.environ
    torchrun = not spawned and all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    if options.exit_with_stdin or spawned:
        _exit_with_stdin()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    try:
        check(config)
        secret = os.environ.pop(SECRET, "")
        rank = int(os.environ[RANK if spawned else "RANK"]) if spawned or torchrun else 0
        if rank == 0 and not secret and not _examined(options):
            raise ValueError(f"{SECRET} is not set; clients must prove that they know it")
        if torchrun and int(os.environ["WORLD_SIZE"]) != config.tensor_parallel:
            raise ValueError(
                f"teacher.tensor_parallel = {config.tensor_parallel}: WORLD_SIZE is {os.environ['WORLD_SIZE']}; "
                "start as many processes as that, or none of them with torchrun"
            )
    except ValueError as error:
        fail(str(error))
    stopping = threading.Event()
    _handle_signals(stopping, listens=rank == 0 and not options.exit_with_stdin)
    store_address = os.environ.get(STORE)
    if spawned or torchrun:
        return run_rank(config, options, rank, secret, stopping, store_address, [])
    return _lead(config, options, secret, stopping, argv)


def _lead(
    config: TeacherConfig,
    options: argparse.Namespace,
    secret: str,
    stopping: threading.Event,
    argv: Sequence[str],
) -> int:
    """Plainly started: start the other ranks, be rank 0. Each child dies when this process does: its stdin ends."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))
    children: list[subprocess.Popen[bytes]] = []
    for rank in range(1, config.tensor_parallel):
        environment = {
            **os.environ,
            RANK: str(rank),
            WORLD: str(config.tensor_parallel),
            STORE: f"127.0.0.1:{listener.getsockname()[1]}",
        }
        command = [sys.executable, str(Path(__file__).resolve()), *argv]
        children.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE))
    return run_rank(config, options, 0, secret, stopping, None, children, listener.detach())


def run_rank(
    config: TeacherConfig,
    options: argparse.Namespace,
    rank: int,
    secret: str,
    stopping: threading.Event,
    store_address: str | None,
    children: list[subprocess.Popen[bytes]],
    listen_fd: int | None = None,
) -> int:
    """Load this rank's part and serve (rank 0) or follow."""
    began = time.monotonic()
    _watch(children, stopping)
    os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))
    import torch

    torch.set_num_threads(config.threads)
    _init_distributed(config.tensor_parallel, rank, store_address, listen_fd)
    from inference.engine import Engine, follow
    from inference.scoring import Scorer
    from inference.teacher import Teacher

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    teacher = Teacher(Path(config.path), config.dtype, device=device)
    scorer = Scorer(
        teacher,
        max_batch_tokens=config.max_batch_tokens,
        logit_chunk=config.logit_chunk,
        max_cache_tokens=config.max_cache_tokens,
    )
    if _examined(options):
        from inference.doctor import examine

        stopping.set()  # a rank that ends now has finished
        passed = examine(config, scorer, reference=options.doctor_reference)
        return 0 if passed or rank != 0 else 1
    if rank != 0:
        follow(scorer)
        return 0
    from inference.server import Server, describe

    engine = Engine(scorer, merge_tokens=config.max_request_tokens)
    try:
        server = Server(config, describe(config, teacher), secret, engine)
    except OSError as error:
        fail(f"teacher.interface = {config.interface!r}, teacher.port = {config.port}: {error}")
    server.start()
    _announce(server.address, options.address_file)
    logger.info("serving %s on %s after %.1f s", config.path, server.address, time.monotonic() - began)
    engine.run(stopping, server.sessions)
    server.close()
    if options.address_file is not None:
        options.address_file.unlink(missing_ok=True)
    for child in children:
        child.wait(timeout=10)
    logger.info("drained, bye")
    return 0


def _init_distributed(world: int, rank: int, store_address: str | None, listen_fd: int | None) -> None:
    """The default process group is the tensor-parallel group."""
    from datetime import timedelta

    import torch

    from inference.session import c10d as dist

    backend = "gloo"
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        torch.cuda.set_device(rank % devices)
        alone = listen_fd is not None or store_address is not None
        if devices >= (world if alone else int(os.environ.get("LOCAL_WORLD_SIZE", world))):  # ranks of this machine
            backend = "cpu:gloo,cuda:nccl"
        elif rank == 0:  # NCCL refuses two ranks on one device; gloo carries CUDA tensors through the host
            logger.warning(
                "teacher.tensor_parallel = %d: more than the %d GPUs here, so ranks share them and talk through the "
                "host, which is slow; use %d", world, devices, devices,
            )  # fmt: skip
    timeout = timedelta(seconds=COLLECTIVE_S)
    if listen_fd is None and store_address is None:
        dist.init_process_group(backend, timeout=timeout)  # torchrun
        return
    if listen_fd is not None:
        store = dist.TCPStore("127.0.0.1", 0, world, True, master_listen_fd=listen_fd, wait_for_workers=False)
    else:
        assert store_address is not None
        host, _, port = store_address.rpartition(":")
        store = dist.TCPStore(host, int(port), world, False)
    # The ranks are on this machine: gloo needs no name resolution.
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _handle_signals(stopping: threading.Event, *, listens: bool) -> None:
    """SIGTERM, SIGINT and SIGUSR1 stop rank 0, which tells the others; these ignore signals sent to the whole group.

    A server that ends with its standard input belongs to a trainer and ignores them too: a launcher that terminates
    the trainer's process tree, or SLURM, whose USR1 reaches every process of a step, would otherwise take the teacher
    away before the trainer has finished its step.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, stop if listens else signal.SIG_IGN)


def _exit_with_stdin() -> None:
    """End this process at once when standard input ends, or when the parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        import select

        while os.getppid() == parent:
            readable, _, _ = select.select([0], [], [], 1.0)
            if readable and not os.read(0, 4096):
                os._exit(0)
        os._exit(1)

    threading.Thread(target=watch, name="stdin", daemon=True).start()


def _watch(children: list[subprocess.Popen[bytes]], stopping: threading.Event) -> None:
    """A rank that dies takes the whole server down; the others would wait for it for ever."""

    def watch() -> None:
        while True:
            time.sleep(0.5)
            for child in children:
                code = child.poll()
                if code is not None and not (stopping.is_set() and code == 0):
                    logger.error("a tensor-parallel rank ended with %d", code)
                    os._exit(2 if code == 2 else 1)

    if children:
        threading.Thread(target=watch, name="ranks", daemon=True).start()


def _announce(address: str, file: Path | None) -> None:
    """Write the address file in one step: whoever sees it can connect."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(address + "\n", encoding="utf-8")
    beside.replace(file)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception:
        logger.exception("the teacher failed")
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    # Session threads may still wait inside gloo; the interpreter's own end would race with them.
    os._exit(code)
