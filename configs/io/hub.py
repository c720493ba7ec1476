"""A model by its directory or by its name on the hub, wherever one can be named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from configs.io.files import read_json, read_yaml
from configs.schema import flat

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]
UNWANTED = ["consolidated*", "original/*"]
"""What is fetched of a hub repository: not the same weights in their authors' own layout."""
TOKENIZER_FILES = {"tokenizer.json", "vocab.json", "vocab.txt", "tekken.json"}
"""What a tokenizer may be made of, besides any *.model (tokenizer.model, spiece.model, sentencepiece.bpe.model)."""


def find_model(key: str, path: str | Path, *, weights: bool = True) -> Path:
    """The directory that `path` names, or that of a hub id (`owner/name`), which is downloaded into the hub's cache
    first, without its weights where they are not wanted. Nothing is looked at in it, and a path that is no hub id need
    not be there.

    Raises ValueError, with `key` (`student.path`, `--model`) in front, where the hub does not give it, and what to do.
    """
    directory, name = Path(path).expanduser(), str(path)
    if directory.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return directory
    from huggingface_hub import constants, errors, snapshot_download

    login = "run `hf auth login` or set HF_TOKEN"
    try:
        unwanted = UNWANTED if weights else [*UNWANTED, "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=unwanted, etag_timeout=5))
    except errors.GatedRepoError:
        mend = f"the model is gated: ask for access at https://huggingface.co/{name}, then {login}"
    except errors.RepositoryNotFoundError:
        mend = f"no such directory, and no such model on the hub; correct the name, or {login} if it is a private one"
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub does not give it ({type(error).__name__})"
        mend = (
            f"no such directory, not in the hub's cache, and {why}; fetch it where there is a network "
            f"(`hf download {name}`), or give a local model directory"
        )
    raise ValueError(f"{key} = {name!r}: {mend}")


def hub_id(directory: Path) -> str | None:
    """`owner/name` of a directory in the hub's cache."""
    found = re.search(r"models--([^/]+)/snapshots/", f"{directory}/")
    return found.group(1).replace("--", "/") if found else None


def as_started(run: Path, key: str, path: str) -> str:
    """A model's `path`; of a hub id the revision that the setting `key` had when the run in this folder was started:
    the hub may have a newer one since, with another line in its README perhaps."""
    file = run / "config.yaml"
    known = str(flat(read_yaml(file) or {}).get(key)) if file.is_file() else path
    return known if hub_id(Path(known)) == path and Path(known).is_dir() else path


def is_adapter(directory: str | Path) -> bool:
    """A directory that peft wrote: an adapter, whose model is elsewhere (some keep a copy of its config.json)."""
    return (Path(directory) / "adapter_config.json").is_file()


def base_of(directory: str | Path, *, weights: bool = False) -> Path:
    """The directory itself, or that of the model which an adapter there stands on. Raises ValueError where the adapter
    does not say which, where it has no weights and they are wanted, and as `find_model`."""
    if not is_adapter(directory):
        return Path(directory)
    file = Path(directory) / "adapter_config.json"
    if weights and not any(Path(directory).glob("adapter_model*.safetensors")):
        raise ValueError("no weights (adapter_model.safetensors) in it; save the adapter with save_pretrained")
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file}: no base_model_name_or_path; say which model the adapter belongs to")
    found = find_model(f"{file}: base_model_name_or_path", base)
    if found.resolve() == Path(directory).resolve():
        raise ValueError(f"{file}: base_model_name_or_path = {base!r} is the adapter itself; name its model")
    return found


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a tokenizer is in a directory: where none is, transformers makes an empty one up."""
    names = {file.name for file in Path(directory).glob("*")}
    return not names.isdisjoint(TOKENIZER_FILES) or any(name.endswith(".model") for name in names)


def tokenizer_home(directory: str | Path) -> Path:
    """Where the tokenizer of a model is: an adapter may bring none of its own."""
    return Path(directory) if has_tokenizer(directory) else base_of(directory)


def read_tokenizer(auto: Any, directory: str | Path) -> Any:
    """The tokenizer of a model, read by `auto`, transformers' AutoTokenizer. No code in the directory is run.

    Where Mistral's own format (tekken.json) lies beside transformers', the latter is read: with mistral_common
    installed transformers would take the other, which has no chat template. One in chat_template.json, which
    transformers gives to processors of images alone, is the tokenizer's where it has none.
    """
    home = tokenizer_home(directory)
    both = all((home / name).is_file() for name in ("tekken.json", "tokenizer.json"))
    tokenizer = auto.from_pretrained(home, trust_remote_code=False, **({"mistral_format": False} if both else {}))
    file = home / "chat_template.json"
    if not getattr(tokenizer, "chat_template", None) and file.is_file():
        tokenizer.chat_template = read_json(file).get("chat_template")
    return tokenizer
