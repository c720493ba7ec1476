"""Server and client as real processes: answers, refusals, broken peers, and how it all ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import TeacherConfig
from inference import client as client_module
from inference import serve_teacher
from inference.attention.packing import Group, groups_of
from inference.client import TeacherClient, TeacherLost, TeacherRefused
from inference.model.backend import check_teacher
from inference.model.output_layer import load_output_layer, output_layer_hash
from inference.protocol import session, wire
from inference.protocol.fingerprint import tokenizer_fingerprint
from inference.protocol.replies import TeacherInfo
from inference.server import server as server_module
from inference.server.launch import LocalTeacher, _tell_end, start_local_teacher
from tests.support.teacher_models import VOCAB, build, reference_logits, save_tokenizer
from tests.support.teacher_servers import SECRET, SERVER, commands_with, serve, wait_until_gone

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12], [13, 14]]
RESPONSES = [[20, 21, 22], [], [23], [24, 2], [30], [31, 32, 33, 34], [40, 41], [42]]
GROUPS = groups_of(PROMPTS, RESPONSES, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("teacher") / "tiny"
    model = build("llama", directory)
    save_tokenizer(directory)
    return model, directory


@pytest.fixture(scope="module")
def teacher(model: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTeacher]:
    """One server on two ranks, started as from inside a launcher's rank, whose variables must not reach it."""
    config = TeacherConfig(tensor_parallel=2)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "1", "WORLD_SIZE": "7", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}.items():
            patch.setenv(name, value)
        running = start_local_teacher(config, model[1], tmp_path_factory.mktemp("work"))
    with running:
        yield running
    assert running.process.poll() == 0


def connect(teacher: LocalTeacher, **settings: Any) -> TeacherClient:
    defaults = {"secret": teacher.secret, "tokenizer_fingerprint": None, "timeout_s": 30.0}
    return TeacherClient(teacher.address, **{**defaults, **settings})


@pytest.fixture
def client(teacher: LocalTeacher) -> Iterator[TeacherClient]:
    with connect(teacher) as connected:
        yield connected


def expected_logprobs(model: Any) -> list[torch.Tensor]:
    """float32 [S] of each group from Hugging Face."""
    out = []
    for group in GROUPS:
        of = [reference_logits(model, group.prompt, response).log_softmax(-1) for response in group.responses]
        labels = torch.tensor([token for response in group.responses for token in response])
        out.append(torch.cat(of).gather(1, labels[:, None])[:, 0])
    return out


def test_every_request(client: TeacherClient, model: tuple[Any, Path]) -> None:
    expected = torch.cat(expected_logprobs(model[0]))
    score = client.score(GROUPS)
    hidden = client.hidden(GROUPS)
    topk = client.topk(GROUPS, k=VOCAB)
    info = client.info()
    got = score.result(30)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    labels = torch.tensor([token for response in RESPONSES for token in response])
    from_hidden = (hidden.result(30) @ load_output_layer(model[1]).T).log_softmax(-1)
    torch.testing.assert_close(from_hidden[torch.arange(len(labels)), labels], got, rtol=0, atol=1e-5)
    # All V entries are the whole distribution.
    torch.testing.assert_close(topk.result(30)[0].exp().sum(-1), torch.ones(len(labels)))
    assert (info.vocab_size, info.hidden_size, info.dtype, info.max_positions) == (VOCAB, 48, "float32", 128)
    assert info.model == "tiny"
    assert info.eos_ids == (2,)
    assert info.tokenizer_fingerprint == tokenizer_fingerprint(model[1])
    assert info.output_layer == output_layer_hash(model[1])


@pytest.mark.parametrize("stopped", [False, True])
def test_a_server_that_ends_by_itself_is_spoken_of(
    stopped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "log").write_text("CUDA out of memory\n")
    process = subprocess.Popen(["sh", "-c", "read line; exit 9"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    if stopped:
        process.stdin.close()
    else:
        process.stdin.write(b"\n")
        process.stdin.flush()
    _tell_end(process, tmp_path / "log")
    assert ("the teacher ended with code 9" in caplog.text and "CUDA out of memory" in caplog.text) != stopped


@pytest.mark.parametrize("address", ["[fd00::2]:29400", "10.0.0.1:29400,fd00::2:29400"])
def test_an_address_that_is_never_reached_is_not_waited_for(address: str) -> None:
    with pytest.raises(ValueError, match=r"teacher\.address = .*: give IPv4 addresses or names; IPv6 is not spoken"):
        TeacherClient(address, secret="", tokenizer_fingerprint=None, timeout_s=600.0)


def test_a_name_that_is_loopback_here_and_an_address_elsewhere_is_refused(
    model: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server would listen where no other machine looks for it."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    config = TeacherConfig(path=str(model[1]), interface="gpu7")
    with pytest.raises(ValueError, match=r"teacher\.interface = 'gpu7': is 127\.0\.1\.1 here, loopback"):
        serve_teacher.check(config, SECRET, doctor=False)


def test_a_long_request_is_asked_in_parts(client: TeacherClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any length, and with more responses than one message takes."""
    kinds = {"score": lambda: client.score(GROUPS), "topk": lambda: client.topk(GROUPS, 3)}
    whole = {name: ask().result(30) for name, ask in kinds.items()}
    for limit, most in (("PART_TOKENS", 8), ("MAX_REQUEST_RESPONSES", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(wire, limit, most)
            assert len(wire.in_parts(wire.Request("score", tuple(GROUPS)))) > 2
            in_parts = {name: ask().result(30) for name, ask in kinds.items()}
        torch.testing.assert_close(in_parts, whole, rtol=0, atol=1e-5)


def test_groups_in_any_order_are_answered_in_batch_order(client: TeacherClient) -> None:
    straight = client.score(GROUPS).result(30)
    shuffled = client.score([GROUPS[2], GROUPS[0], GROUPS[3], GROUPS[1]]).result(30)
    torch.testing.assert_close(straight, shuffled, rtol=0, atol=1e-6)


def test_generate_ends_with_an_ending_id(client: TeacherClient, model: tuple[Any, Path]) -> None:
    free = client.generate(PROMPTS, max_new_tokens=6, eos_ids=[]).result(30)
    for prompt, response in zip(PROMPTS, free, strict=True):
        # greedy: each token is the likeliest one given what came before it
        logits = reference_logits(model[0], tuple(prompt), response)
        assert logits.argmax(-1).tolist() == list(response)
    end = free[0][2]
    stopped = client.generate(PROMPTS, max_new_tokens=6, eos_ids=[end, 2]).result(30)
    for long, short in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(long) if token in (end, 2)]
        assert short == (long[: ends[0] + 1] if ends else long)
    sampled = [client.generate(PROMPTS, max_new_tokens=6, temperature=1.0, seed=s).result(30) for s in (1, 1, 2)]
    assert len(sampled[0]) == 4
    assert sampled[0] == sampled[1] != sampled[2]
    some = client.generate(PROMPTS[2:], max_new_tokens=6, temperature=1.0, seed=1, numbers=[2, 3]).result(30)
    assert some == sampled[0][2:]


def test_clients_at_the_same_time_get_their_own_answers(teacher: LocalTeacher, model: tuple[Any, Path]) -> None:
    expected = expected_logprobs(model[0])
    clients = [connect(teacher) for _ in range(3)]
    try:
        futures = [
            (n, c.score([replace(GROUPS[n], first_response=0)])) for _ in range(10) for n, c in enumerate(clients)
        ]
        for n, future in futures:
            torch.testing.assert_close(future.result(30), expected[n], rtol=0, atol=1e-4)
    finally:
        for connected in clients:
            connected.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"secret": "wrong"}, "secret"),
        ({"tokenizer_fingerprint": "f" * 32}, "f" * 32 + ".*{tokenizer}"),
    ],
)
def test_a_client_that_does_not_fit_is_refused_at_once(
    teacher: LocalTeacher, model: tuple[Any, Path], settings: dict[str, Any], message: str
) -> None:
    began = time.monotonic()
    with pytest.raises(TeacherRefused, match=message.replace("{tokenizer}", tokenizer_fingerprint(model[1]))):
        connect(teacher, **settings)
    assert time.monotonic() - began < 20, "within the 30 s that it would wait for a server"


def test_what_fits_is_served(teacher: LocalTeacher, model: tuple[Any, Path]) -> None:
    with connect(teacher, tokenizer_fingerprint=tokenizer_fingerprint(model[1])) as fitting:
        fitting.score(GROUPS).result(30)


def test_a_refused_request_does_not_stop_its_client(client: TeacherClient) -> None:
    too_many = [Group((1,), ((2,),) * (wire.MAX_REQUEST_RESPONSES + 1))]
    with pytest.raises(TeacherRefused, match=r"responses: 65537 is not within \[0, 65536\]"):
        client.score(too_many).result(30)
    with pytest.raises(TeacherRefused, match="token id"):
        client.score([Group((VOCAB,), ((1,),))]).result(30)
    with pytest.raises(TeacherRefused, match="temperature"):
        client.score(GROUPS, temperature=float("nan")).result(30)
    client.score(GROUPS).result(30)


def test_a_garbage_header_ends_its_own_session_only(teacher: LocalTeacher, client: TeacherClient) -> None:
    other = connect(teacher)
    channel = other._channel
    assert channel is not None
    garbage = torch.randint(-(2**62), 2**62, (wire.HEADER_WORDS,), generator=torch.Generator().manual_seed(1))
    channel.send([garbage], 20)
    words = channel.receive_header(20)
    assert words[2] == 1
    assert "magic" in wire.decode_json(channel.receive(words[4], torch.uint8, 20))["error"]
    with pytest.raises(RuntimeError):
        channel.receive_header(20)
    client.score(GROUPS).result(30)
    other.score(GROUPS).result(30)  # its client opens a new session
    other.close()


def test_hostile_peers_without_the_secret(teacher: LocalTeacher, client: TeacherClient) -> None:
    host, _, port = teacher.address.rpartition(":")
    for data in (b"\x00" * 64, b"GET / HTTP/1.0\r\n\r\n", os.urandom(4096)):
        with socket.create_connection((host, int(port)), timeout=20) as peer:
            peer.sendall(data)
    store = session.c10d.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=20))
    for announced in (b"{", b"[1]", b'{"session": "../../x", "nonce": 1}', b"x" * 100_000, b'{"session": null}'):
        store.set(session.ANNOUNCED + session.new_nonce(), announced)
    name = session.new_nonce()
    hello = {"session": name, "nonce": session.new_nonce(), "version": wire.VERSION}
    session.put(store, session.ANNOUNCED + name, hello)
    session.take(store, session.key(name, "challenge"))
    session.put(store, session.key(name, "answer"), {"proof": "0" * 64})
    assert "secret" in session.take(store, session.key(name, "verdict"))["error"]
    with connect(teacher) as later:
        later.score(GROUPS).result(30)
    client.score(GROUPS).result(30)
    assert teacher.process.poll() is None


CLIENT_SCRIPT = """
import sys; sys.path[0] = {root!r}
from inference.client import TeacherClient
from inference.attention.packing import Group
client = TeacherClient({address!r}, secret={secret!r}, tokenizer_fingerprint=None, timeout_s=30)
print("ready", flush=True)
while True:
    client.score([Group(tuple(range(1, 60)), (tuple(range(1, 60)),) * 40)]).result()
"""


@pytest.mark.alone
def test_a_client_killed_in_a_request_leaves_the_others_alone(teacher: LocalTeacher, client: TeacherClient) -> None:
    code = CLIENT_SCRIPT.format(root=str(ROOT), address=teacher.address, secret=teacher.secret)
    victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    victim.kill()
    victim.wait()
    began = time.monotonic()
    client.score(GROUPS).result(30)
    assert time.monotonic() - began < 20, "the server is not waiting for the one that is gone"
    victim.stdout.close()


class Idle:
    """An engine that has nothing to do."""

    def submit(self, request: wire.Request) -> Future[list[torch.Tensor]]:
        future: Future[list[torch.Tensor]] = Future()
        future.set_result([])
        return future


def test_sessions_are_limited_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_SESSIONS", 4)
    names = ("model", "dtype", "tokenizer_fingerprint", "output_layer")
    info = TeacherInfo(vocab_size=9, hidden_size=4, max_positions=8, eos_ids=(), **dict.fromkeys(names, ""))
    server = server_module.Server(TeacherConfig(), info, SECRET, Idle())  # type: ignore[arg-type]
    server.start()

    def connected(timeout_s: float) -> TeacherClient:
        return TeacherClient(server.address, secret=SECRET, tokenizer_fingerprint=None, timeout_s=timeout_s)

    for _ in range(3):
        clients = [connected(30) for _ in range(4)]
        with pytest.raises(TeacherLost, match="none of 4 sessions is free"):
            connected(0.5)
        for client in clients:
            client.close()
    server.close()


def test_the_secret_is_nowhere_to_be_read(teacher: LocalTeacher) -> None:
    assert teacher.secret not in teacher.log.read_text()
    for arguments in commands_with(str(teacher.log.parent)).values():
        assert teacher.secret not in arguments


OWNER_SCRIPT = """
import sys, time; sys.path[0] = {root!r}
from pathlib import Path
from configs.schema import TeacherConfig
from inference.protocol.replies import TeacherInfo
from inference.server import server as server_module
from inference.server.launch import start_local_teacher
teacher = start_local_teacher(TeacherConfig(tensor_parallel=2), Path({model!r}), Path({work!r}))
print("ready", flush=True)
time.sleep(600)
"""


def test_no_process_is_left_when_the_owner_is_killed(model: tuple[Any, Path], tmp_path: Path) -> None:
    work = tmp_path / "owned"
    code = OWNER_SCRIPT.format(root=str(ROOT), model=str(model[1]), work=str(work))
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    mark = str(work / "teacher.address")
    assert len(commands_with(mark)) == 2
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_until_gone(mark)


def test_a_restarted_server_is_found_again_and_sigterm_exits_0(model: tuple[Any, Path], tmp_path: Path) -> None:
    address_file = tmp_path / "teacher.address"
    first = serve(model[1], address_file, tmp_path / "log")
    client = TeacherClient(str(address_file), secret=SECRET, tokenizer_fingerprint=None, timeout_s=400)
    before = client.score(GROUPS).result(30)
    first.kill()
    first.wait()
    address_file.unlink()
    asked = client.score(GROUPS)
    assert not asked.done()
    second = serve(model[1], address_file, tmp_path / "log")
    assert torch.equal(asked.result(400), before)
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 0
    assert not address_file.exists()
    client._timeout_s = 1.0
    with pytest.raises(TeacherLost, match="no teacher"):
        client.score(GROUPS).result(30)
    client.close()
    with pytest.raises(TeacherLost, match="closed"):
        client.score(GROUPS).result(30)


def test_an_early_death_shows_the_last_log_lines(model: tuple[Any, Path], tmp_path: Path) -> None:
    nowhere = TeacherConfig(tensor_parallel=1, interface="192.0.2.1")  # an address that no machine has (RFC 5737)
    with pytest.raises(RuntimeError, match=r"teacher\.interface = '192\.0\.2\.1'"):
        start_local_teacher(nowhere, model[1], tmp_path / "work")
    assert not commands_with(str(tmp_path / "work" / "teacher.address"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--path", "/nowhere"], "teacher.path = '/nowhere': no such directory"),
        (["--path", "MODEL", "--tensor_parallel", "3"], "teacher.tensor_parallel = 3: .*: 1, 2, 4"),
        (["--path", "MODEL", "--nonsense", "3"], "nonsense"),
        (["--path", "MODEL", "--logit_chunk", "0"], "teacher.logit_chunk = 0: must be at least 1"),
        (["--path", "MODEL", "--interface", "0.0.0.0"], "teacher.interface"),
        (["--path", "MODEL", "--interface", "::1"], "teacher.interface = '::1': .*; name an IPv4 address"),
        (["--path", "MODEL"], "GRPO_KD_TEACHER_SECRET is not set"),
        (["--path", "demo"], "demo"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(model: tuple[Any, Path], flags: list[str], message: str) -> None:
    command = [sys.executable, str(SERVER), *(str(model[1]) if flag == "MODEL" else flag for flag in flags)]
    environment = {name: value for name, value in os.environ.items() if name != "GRPO_KD_TEACHER_SECRET"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 2
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_check_teacher_needs_no_model(tmp_path: Path, model: tuple[Any, Path]) -> None:
    def check(path: Path, size: int, backend: str = "megatron") -> str:
        return check_teacher(TeacherConfig(path=str(path), tensor_parallel=size, backend=backend))[0]

    assert check(model[1], 4, "auto") == "megatron"
    for directory, message in ((tmp_path / "no", "no such directory"), (tmp_path, "no config.json")):
        with pytest.raises(ValueError, match=message):
            check(directory, 1)
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(ValueError, match="safetensors"):
        check(tmp_path, 1)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"'bloom'.*llama, mistral, qwen2, qwen3, gemma2, gemma3_text, gemma3, gpt2"):
        check(tmp_path, 1)
    assert check(tmp_path, 2, "auto") == "transformers"
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(ValueError, match=r"config\.json: .* hidden size \(8\) is not a multiple"):
        check(tmp_path, 1)
    with pytest.raises(ValueError, match="known are auto, megatron, transformers"):
        check(tmp_path, 1, "vllm")


def test_check_teacher_imports_nothing_heavy() -> None:
    code = (
        f"import sys; sys.path[0] = {str(ROOT)!r}; import inference.model.backend;"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_teacher_that_is_there_but_too_slow_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it could be reached it was asked the same again each second, in a session more, and for ever."""
    opened: list[float] = []

    class Reached:
        address, info = "10.0.0.5:29400", None

        def __init__(self, *_: object, **__: object) -> None:
            self.closed = threading.Event()

        def open(self, deadline: float, reason: str) -> object:
            opened.append(deadline)
            return object()

    def late(channel: object, request: object, timeout_s: float) -> None:
        time.sleep(timeout_s)
        raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")

    monkeypatch.setattr(client_module, "Connector", Reached)
    monkeypatch.setattr(client_module, "_exchange", late)
    with TeacherClient("x", secret="", tokenizer_fingerprint=None, timeout_s=1.0) as client:
        said = r"the teacher at 10.0.0.5:29400 has not answered for 1 s \(teacher.timeout_s\): Timed out waiting"
        with pytest.raises(TeacherLost, match=said):
            client.score([Group((1,), ((2,),))]).result(timeout=10)
    assert len(opened) == 1
