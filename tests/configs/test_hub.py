"""A model by its name on the hub, in every program; what keeps it away is one line with the mend."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from configs.io.hub import as_started, base_of, find_model, has_tokenizer, tokenizer_home
from inference.model.files import end_ids
from tests.support.hub_server import Hub
from tests.support.runs import ROOT, environment

FIND = """
import json, sys
from configs.io.hub import find_model
def found(name):
    try:
        return sorted(file.name for file in find_model("--model", name).iterdir())
    except ValueError as error:
        return str(error)
print(json.dumps([found(name) for name in sys.argv[1:]]))
"""


def test_the_hub_gives_it_or_a_line_says_what_to_do(tmp_path: Path) -> None:
    for name in ("there", "gated", "down"):
        (tmp_path / "hub" / "org" / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors", "consolidated.safetensors", "model.bin"):
            (tmp_path / "hub" / "org" / name / file).write_text("{}")
    hub = Hub(tmp_path / "hub")
    hub.gated, hub.down = {"org/gated"}, {"org/down"}
    started = environment() | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", FIND, "org/there", "org/gated", "org/missing", "org/down"]

    def ask(**variables: str) -> list[str]:
        env = started | variables
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=240)
        said: list[str] = json.loads(done.stdout)
        return said

    try:
        online, offline = ask(), ask(HF_HUB_OFFLINE="1")
    finally:
        hub.close()
    assert online[0] == offline[0] == ["config.json", "model.safetensors"], "no second copy of the weights"
    assert online[1] == (
        "--model = 'org/gated': the model is gated: ask for access at https://huggingface.co/org/gated, then run "
        "`hf auth login` or set HF_TOKEN"
    )
    assert "no such model on the hub; correct the name, or run `hf auth login` or set HF_TOKEN" in online[2]
    assert "the hub does not give it" in online[3]
    for line in offline[1:]:
        assert "not in the hub's cache, and HF_HUB_OFFLINE is set; fetch it where there is a network (`hf dow" in line


def test_what_is_no_hub_id_is_a_path(tmp_path: Path) -> None:
    for path in ("/no/such", "./a/b", "a", "a/b/c", str(tmp_path)):
        assert find_model("student.path", path) == Path(path)


def serve(name: str) -> int:
    from inference.serve_teacher import main

    return main(["--path", name])


def heldout(name: str) -> int:
    from eval.heldout import main

    return main(["--model", name])


def measure(name: str) -> int:
    from eval.measure import main

    return main(["perplexity", "--model", name, "--text", "fo=x.txt"])


def euroeval(name: str) -> int:
    from eval.run_euroeval import main

    return main(["--model", name])


def train(name: str) -> int:
    from training.main import main

    return main(["--teacher.path", name])


@pytest.mark.parametrize("program", [serve, heldout, measure, euroeval, train])
def test_every_program_says_it_in_one_line_with_exit_code_2(
    program: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = program("nobody/nothing")
    except SystemExit as ended:
        code = int(str(ended.code))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert "'nobody/nothing': no such directory, not in the hub's cache, and HF_HUB_OFFLINE is set" in line


def test_an_adapter_stands_on_its_base_and_may_bring_a_tokenizer(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    assert base_of(base) == base
    assert not has_tokenizer(base)
    (base / "config.json").write_text('{"eos_token_id": 7}')
    (base / "spiece.model").write_bytes(b"x")  # GPT-SW3's
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert has_tokenizer(base)
    assert base_of(adapter) == tokenizer_home(adapter) == base
    assert end_ids(adapter) == (7,)
    (adapter / "tokenizer.json").write_text("{}")
    assert (base_of(adapter), tokenizer_home(adapter)) == (base, adapter)
    (adapter / "config.json").write_text('{"eos_token_id": 8}')  # a copy, as some programs put beside it
    assert (base_of(adapter), end_ids(adapter)) == (base, (7,))
    for content, message in (
        ("{}", "no base_model_name_or_path"),
        (json.dumps({"base_model_name_or_path": str(adapter)}), "is the adapter itself"),
    ):
        (adapter / "adapter_config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{message}"):
            base_of(adapter)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no weights (adapter_model.safetensors) in it; save the adapter with save_pretrained"),
        ("{}", "no base_model_name_or_path; say which model the adapter belongs to"),
        ('{"base_model_name_or_path": "."}', "is the adapter itself; name its model"),
    ],
)
def test_half_an_adapter_is_told_in_the_same_words_wherever_it_is_named(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval.measures.model import check_model
    from training.data.preflight import model_directory

    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_config.json").write_text(content or "{}")
    if content is not None:
        (tmp_path / "adapter_model.safetensors").touch()
    for key, check in (
        ("student.path = ", lambda: model_directory("student.path", ".")),
        ("--model ", lambda: check_model(".")),
    ):
        with pytest.raises(ValueError, match=f"^{key}.*{re.escape(message)}$"):
            check()


def test_an_end_that_is_null_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": null, "text_config": {"eos_token_id": [1, 106]}}')
    assert end_ids(tmp_path) == (1, 106)


def test_a_run_goes_on_with_the_revisions_that_it_was_started_with(tmp_path: Path) -> None:
    """The hub's repository may change in a week: a run that asks for it by name would be refused as one of another
    model."""
    cache, run = tmp_path / "hub" / "models--org--seven-b" / "snapshots", tmp_path / "run"
    (cache / "first").mkdir(parents=True)
    (cache / "second").mkdir()
    run.mkdir()
    assert as_started(run, "student.path", "org/seven-b") == "org/seven-b", "not begun yet"
    values = {"student": {"path": str(cache / "first")}, "teachers": [{"path": str(cache / "first")}, {"path": "x"}]}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert as_started(run, "student.path", "org/seven-b") == str(cache / "first")
    assert as_started(run, "teachers[0].path", "org/seven-b") == str(cache / "first")
    for key, path in (
        ("student.path", "org/eight-b"),  # another model is another setting
        ("student.path", str(cache / "second")),  # a revision that was asked for
        ("teachers[1].path", "org/seven-b"),
        ("teacher.path", "org/seven-b"),
    ):
        assert as_started(run, key, path) == path
    (cache / "first").rmdir()  # the cache was emptied
    assert as_started(run, "student.path", "org/seven-b") == "org/seven-b"
