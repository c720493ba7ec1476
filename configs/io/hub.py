"""A model by its directory or by its name on the hub, wherever one can be named."""

from __future__ import annotations

from pathlib import Path

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]
UNWANTED = ["consolidated*", "original/*"]
"""What is fetched of a hub repository: not the same weights in their authors' own layout."""


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
        mend = f"no such directory, and no such model on the hub; mend the name, or {login} if it is a private one"
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub does not give it ({type(error).__name__})"
        mend = (
            f"no such directory, not in the hub's cache, and {why}; fetch it where there is a network "
            f"(`hf download {name}`), or give a local model directory"
        )
    raise ValueError(f"{key} = {name!r}: {mend}")
