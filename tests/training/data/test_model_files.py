"""A model directory that cannot be used is named with its key in one line, before any weight is read."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.teacher_models import build, save_tokenizer
from training.data.model_files import check_model_files
from training.data.preflight import model_directory


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("llama", folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def changed(**values: Any) -> Callable[[Path], None]:
    """A breakage: config.json with these values."""

    def breakage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return breakage


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def cut_short(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-100])


def no_header(folder: Path) -> None:
    shard(folder).write_bytes(b"\xff" * 1000)


def empty(folder: Path) -> None:
    shard(folder).write_bytes(b"")


def fewer_rows(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:50].clone()
            save_file(tensors, file, metadata={"format": "pt"})


def flat(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = {name: torch.zeros(3) if "embed_tokens" in name else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def test_a_good_one_passes(model: Path) -> None:
    check_model_files("student.path", model)
    assert model_directory("student.path", str(model)) == model


@pytest.mark.parametrize(
    ("breakage", "said"),
    [
        (cut_short, "is damaged"),
        (no_header, "is damaged"),
        (empty, "is damaged"),
        (lambda folder: shard(folder).unlink(), "index.json names"),
        (fewer_rows, "model.embed_tokens.weight the shape [101, 48], and it has [50, 48]"),
        (flat, "model.embed_tokens.weight the shape [101, 48], and it has [3]"),
        (changed(num_hidden_layers=10**9), "1000000000 layers, and the weights are 30 tensors"),
        (changed(num_hidden_layers="many"), "'many' layers"),
        (changed(num_hidden_layers=-1), "-1 layers"),
        (changed(num_hidden_layers=None), "None layers"),
        (changed(vocab_size=10**12), "1000000000000"),
        (changed(hidden_size=10**9), "config.json"),
        (changed(intermediate_size=10**12), "1000000000000"),
        (changed(num_attention_heads=3), "q_proj.weight the shape [36, 48], and it has [48, 48]"),
        (changed(model_type="unheard_of"), "config.json describes no causal language model"),
        (written("config.json", b"[1, 2]"), "config.json"),
        (written("config.json", b"{"), "config.json"),
        (written("config.json", b"[" * 100_000), "config.json"),
        (written("model.safetensors.index.json", b'{"weight_map": 5}'), "index.json"),
        (written("model.safetensors.index.json", b'{"weight_map": {"a": 5}}'), "index.json"),
        (written("model.safetensors.index.json", b'{"weight_map": {"a": "../../x.safetensors"}}'), "index.json"),
        (written("tokenizer.json", b"{}"), "its tokenizer cannot be read"),
        (written("tokenizer.json", b"\x00\xff"), "its tokenizer cannot be read"),
        (without("tokenizer.json"), "tokenizer"),
    ],
    ids=lambda value: value.replace(" ", "-")[:40] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("key", ["student.path", "teachers[1].path"])
def test_what_is_broken_is_named_at_once(key: str, breakage: Callable[[Path], None], said: str, model: Path) -> None:
    breakage(model)
    began = time.process_time()
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        model_directory(key, str(model))
    message = str(raised.value)
    assert message.startswith(key)
    assert "\n" not in message
    assert len(message) < 600
    assert time.process_time() - began < 10


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
KEYS = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "text_config", "n_layer", "model_type")


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1), name=st.just("config.json"))
@example(values={"weight_map": {"a": []}}, name="model.safetensors.index.json")
@example(values={"weight_map": [1]}, name="model.safetensors.index.json")
def test_whatever_is_in_the_configuration(values: dict[str, Any], name: str, good: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(good, model, dirs_exist_ok=True)
    file = model / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    said = ""
    try:
        check_model_files("student.path", model)
    except ValueError as error:
        said = str(error)
    assert not said or said.startswith("student.path")
    assert "\n" not in said


@pytest.mark.parametrize("part", ["AutoConfig", "AutoTokenizer"])
def test_code_in_a_model_directory_is_not_offered_to_be_run(
    part: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask at a terminal, and one `y` would run it."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda said: asked.append(said) or "n")
    if part == "AutoConfig":
        changed(model_type="unheard_of", auto_map={part: "own.Own"})(model)
    else:
        own = {"tokenizer_class": "OwnTokenizer", "auto_map": {part: ["own.Own", None]}}
        (model / "tokenizer_config.json").write_text(json.dumps(own))
    (model / "own.py").write_text("raise RuntimeError('it was run')")
    with pytest.raises(ValueError, match=r"^student\.path = .*custom code"):
        check_model_files("student.path", model)
    assert not asked


def test_an_adapter_is_named_by_what_it_lacks(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    described = adapter / "adapter_config.json"
    described.write_text(json.dumps({"base_model_name_or_path": str(model)}))
    with pytest.raises(ValueError, match=r"^student\.path = .*no weights \(adapter_model\.safetensors\)"):
        model_directory("student.path", str(adapter))
    (adapter / "adapter_model.safetensors").touch()
    assert model_directory("student.path", str(adapter)) == adapter
    shard(model).unlink()
    with pytest.raises(ValueError, match=r"^student\.path = '.*/model': .*index\.json names"):
        model_directory("student.path", str(adapter))
    described.write_text("{}")
    with pytest.raises(ValueError, match=r"^student\.path = .*no base_model_name_or_path"):
        model_directory("student.path", str(adapter))
