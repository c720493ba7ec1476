"""Serve the teacher.

    GRPO_KD_TEACHER_SECRET=... python inference/serve_teacher.py --config configs/RUN.yaml [--teacher.port 29400]
    GRPO_KD_TEACHER_SECRET=... python inference/serve_teacher.py --path DIR --tensor_parallel 2 --address_file FILE
    python inference/serve_teacher.py --path DIR --tensor_parallel 2 --doctor

Takes the `teacher` section of a run's configuration, or its fields as flags. Started plainly it starts the other
tensor-parallel ranks itself; under torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) it is one of them. At SIGTERM,
SIGHUP or Ctrl-C it takes no more requests, answers pending ones for some seconds, and exits 0; 1 after a failure.
The secret is read from the environment only. `--doctor` prints placement, memory, a self-test and speed, and exits 0 if
all is well; `--doctor_reference` also compares with transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # a trace of C++ for each peer that leaves in the middle of a word

from configs.checks import check_ranges
from configs.io.files import read_yaml, write_atomically
from configs.io.hub import find_model
from configs.io.loading import loading
from configs.schema import DEMO, TeacherConfig
from inference.model.backend import BACKENDS, Backend, check_teacher, processes
from inference.server.guard import Flood
from inference.server.launch import SECRET
from inference.server.ranks import Ranks, exit_with_stdin, launched

logger = logging.getLogger("teacher")
BEGAN = time.monotonic()


def fail(message: str) -> NoReturn:
    """A user's mistake: one line, exit code 2. Where all ranks find it, rank 0 says it, and the others end with it."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
    print(f"serve_teacher: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse(argv: Sequence[str]) -> tuple[TeacherConfig, Any]:
    """The teacher's configuration, and the options of this process alone."""
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            fail(" ".join(message.split()) + " (--help lists every key)")

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(description=__doc__, default_env=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file of a run; its `teacher` section is read")
    parser.add_argument("--address_file", type=Path, help="file that gets host:port once the server is ready")
    parser.add_argument("--exit_with_stdin", action="store_true", help="exit when standard input ends")
    parser.add_argument("--doctor", action="store_true", help="examine the teacher, print what was found, exit")
    parser.add_argument("--doctor_reference", action="store_true", help="the same, against transformers' numbers too")
    parser.add_class_arguments(TeacherConfig, as_group=False)
    flags = [re.sub(r"^--teacher\.", "--", argument) for argument in argv]
    options = parser.parse_args(flags)
    if options.config is not None:  # flags come after the file's and win
        options = parser.parse_args(_section(options.config) + flags)
    return TeacherConfig(**{field.name: options[field.name] for field in dataclasses.fields(TeacherConfig)}), options


def _section(file: Path) -> list[str]:
    """The `teacher` section of a run's YAML as flags."""
    try:
        content = read_yaml(file)
        section = (content or {}).get("teacher") or {}
        return [f"--{key}={'null' if value is None else value}" for key, value in section.items()]
    except (ValueError, AttributeError) as error:
        fail(f"--config {file}: {' '.join(str(error).split())}")


def check(config: TeacherConfig, secret: str, *, doctor: bool) -> TeacherConfig:
    """What can be told before anything is loaded; the configuration with its backend chosen."""
    if config.path == DEMO:
        raise ValueError("teacher.path = 'demo': the trainer builds the demo teacher; name its directory here")
    if config.interface in ("0.0.0.0", "::", ""):
        raise ValueError(f"teacher.interface = {config.interface!r}: name one address of this machine")
    try:
        address = socket.gethostbyname(config.interface)
    except OSError as error:
        raise ValueError(f"teacher.interface = {config.interface!r}: {error.strerror}; name an IPv4 address") from None
    if address.startswith("127.") and not config.interface.startswith(("127.", "localhost")):
        # Debian's /etc/hosts has a machine's own name so; the others would look for the server at its real address.
        raise ValueError(f"teacher.interface = {config.interface!r}: is {address} here, loopback; name an address")
    check_ranges(config, "teacher.")
    config = dataclasses.replace(config, path=str(find_model("teacher.path", config.path, weights=config.url is None)))
    backend, why = check_teacher(config)
    asked, config = config.backend, dataclasses.replace(config, backend=backend)
    if not secret and not doctor and os.environ.get("RANK", "0") == "0":
        raise ValueError(f"{SECRET} is not set; clients must prove that they know it")
    if launched() and int(os.environ["WORLD_SIZE"]) != processes(config):
        raise ValueError(
            f"teacher.tensor_parallel = {config.tensor_parallel}: WORLD_SIZE is {os.environ['WORLD_SIZE']}, and the "
            f"{backend} backend has {processes(config)} processes here; start as many, or none of them with torchrun"
        )
    if os.environ.get("RANK", "0") == "0":
        logger.info("teacher.backend = %r: %s, because %s", asked, backend, why)
    return config


def main(argv: Sequence[str]) -> int:
    """Start the ranks, load, and serve (rank 0) or follow."""
    config, options = parse(argv)
    doctor = options.doctor or options.doctor_reference
    if options.exit_with_stdin:
        exit_with_stdin()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    logger.addFilter(Flood())
    logging.getLogger("megatron").setLevel(logging.WARNING)
    secret = os.environ.pop(SECRET, "")
    try:
        config = check(config, secret, doctor=doctor)
    except ValueError as error:
        fail(str(error))
    ranks = Ranks(Path(__file__).resolve(), argv, processes(config))
    ranks.handle_signals(ignore=options.exit_with_stdin)
    try:
        backend = load(config, ranks)
    except ValueError as error:
        fail(str(error))
    from inference.server.self_test import against_transformers, examine

    if doctor:
        ranks.stopping.set()
        passed = examine(config, backend, reference=options.doctor_reference)
        return 0 if passed or ranks.rank != 0 else 1
    right, found = against_transformers(config, backend)
    if not right:
        fail(f"teacher.path = {config.path!r}: {found}; set teacher.backend to transformers, and report the model")
    if ranks.rank != 0:
        from inference.server.engine import follow

        follow(backend)
        return 0
    logger.info("checked: %s", found)
    if not serve(config, backend, secret, ranks, options.address_file):
        return 1
    logger.info("drained, bye")
    return 0


def load(config: TeacherConfig, ranks: Ranks) -> Backend:
    """This rank's part of the teacher."""
    os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # rows of all lengths follow each other
    with loading():
        import torch

    torch.set_num_threads(config.threads)
    return BACKENDS[config.backend].load(config, ranks.join())


def serve(config: TeacherConfig, backend: Backend, secret: str, ranks: Ranks, address_file: Path | None) -> bool:
    """Answer clients until a signal comes, and finish what was asked by then; False where it could not go on."""
    from inference.server.engine import Engine
    from inference.server.server import Server

    engine = Engine(backend)
    try:
        info = dataclasses.replace(backend.info, kinds=engine.kinds)
        server = Server(config, info, secret, engine, ranks.stopping)
    except OSError as error:
        fail(f"teacher.interface = {config.interface!r}, teacher.port = {config.port}: {error}")
    server.start()
    if address_file is not None:  # whole from the start: whoever sees it can connect
        write_atomically(address_file, server.address + "\n")
    logger.info("serving %s on %s after %.1f s", config.path, server.address, time.monotonic() - BEGAN)
    engine.run(ranks.stopping, server.sessions)
    server.close()
    if address_file is not None:
        address_file.unlink(missing_ok=True)
    ranks.wait()
    return not server.failed


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
