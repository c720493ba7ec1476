"""What runs a teacher behind the server: one row in BACKENDS for each library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from configs.checks import require
from configs.io.files import read_json
from configs.io.loading import loading
from configs.schema import TeacherConfig
from inference.model.files import check_directory, check_heads, megatron_model

if TYPE_CHECKING:  # the table is read before anything heavy is loaded
    import torch

    from inference.protocol.replies import TeacherInfo
    from inference.protocol.wire import Request


class Backend(Protocol):
    """One rank's part of a teacher. Every rank calls each method with the same request and comes to the same reply:
    tensors on the CPU whose first dimension is S (all response tokens, in batch order) unless said otherwise.

    It may also have the methods below; a client that asks for what is not there is refused.
    topk: log-probabilities [S, K] and ids [S, K] of the `k` likeliest entries.
    hidden: states after the final norm [S, Hidden], in the model's type; the other ranks than 0 may leave them out.
    open: states [A, Hidden] that predict the next token of the growing responses. next: the same after one more token,
    or wire.StateLost before anything is computed, where that does not go on from what is held. release: nothing.
    first_layers: a context manager under which the model has its first N layers alone, and `layers`, what attention
    each of them has: so that the start can compare what it says with transformers.
    """

    @property
    def info(self) -> TeacherInfo:
        """What clients may know."""

    def parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        """This rank's weights by name."""

    def score(self, request: Request) -> list[torch.Tensor]:
        """Log-probabilities float32 [S] of the response tokens."""

    def answer(self, request: Request) -> list[torch.Tensor]:
        """An answer to each prompt: lengths int64 [N], tokens int64 [sum of lengths]. It ends with one of `ids`, which
        belongs to it, or at `max_new_tokens`; temperature 0 is greedy."""


@dataclass(frozen=True)
class BackendRow:
    """A row of BACKENDS."""

    load: Callable[[TeacherConfig, torch.device], Backend]
    """Loads this rank's part of `path` onto a device. Collective; ValueError with the mend where it cannot."""
    check: Callable[[TeacherConfig, str], None] = lambda config, key: None
    """From files alone: a ValueError with the mend unless it can serve `path`. The second argument: whose settings."""
    one_process: bool = False
    """Whether it is never cut over `tensor_parallel` processes."""
    elsewhere: bool = False
    """The weights are not here."""


def check_teacher(config: TeacherConfig, key: str = "teacher") -> tuple[str, str]:
    """The row of BACKENDS that serves `config.path`, and why that one. Raises a ValueError with the mend where none
    does. `key`: whose settings they are, for the message."""
    if config.backend == AUTO and config.url is not None:
        _check_endpoint(config, key)
        return "openai", f"{key}.url is set"
    if config.backend != AUTO:
        if config.backend not in BACKENDS:
            raise ValueError(f"{key}.backend = {config.backend!r}: known are {', '.join((AUTO, *BACKENDS))}")
        here = not BACKENDS[config.backend].elsewhere
        require(not here or config.url is None, f"{key}.url", config.url, f"is not for {key}.backend {config.backend}")
        BACKENDS[config.backend].check(config, key)
        return config.backend, "as asked"
    check_directory(Path(config.path), key)
    try:
        architecture = megatron_model(Path(config.path), key)
    except ValueError as error:
        BACKENDS["transformers"].check(config, key)
        return "transformers", f"Megatron does not run it: {error}"
    check_heads(architecture, config.tensor_parallel, key)
    return "megatron", "it computes this family exactly"


def processes(config: TeacherConfig) -> int:
    """How many a server of this teacher has; its `backend` is a row of BACKENDS."""
    return 1 if BACKENDS[config.backend].one_process else config.tensor_parallel


def _megatron(config: TeacherConfig, device: torch.device) -> Backend:
    with loading():
        from inference.model.scoring import Scorer
        from inference.model.teacher import Teacher

    return Scorer(
        Teacher(Path(config.path), config.dtype, device=device),
        max_batch_tokens=config.max_batch_tokens,
        logit_chunk=config.logit_chunk,
        max_cache_tokens=config.max_cache_tokens,
    )


def _check_megatron(config: TeacherConfig, key: str) -> None:
    check_directory(Path(config.path), key)
    check_heads(megatron_model(Path(config.path), key), config.tensor_parallel, key)


def _transformers(config: TeacherConfig, device: torch.device) -> Backend:
    from inference.model.plain import PlainTeacher

    return PlainTeacher(config, device)


def _check_transformers(config: TeacherConfig, key: str) -> None:
    check_directory(Path(config.path), key)
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = read_json(Path(config.path) / "config.json").get("model_type")
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{key}.path = {config.path!r}: model_type = {kind!r} is no causal language model of the installed "
            "transformers; give another model, or install a transformers that knows it"
        )


def _endpoint(config: TeacherConfig, device: torch.device) -> Backend:
    from inference.model.endpoint import Endpoint

    return Endpoint(config, device)


def _check_endpoint(config: TeacherConfig, key: str) -> None:
    good = urlsplit(config.url or "").scheme in ("http", "https")
    require(good, f"{key}.url", config.url, "give the address of vLLM or SGLang, as http://host:8000/v1")
    described = (Path(config.path) / "config.json").is_file()
    require(
        described, f"{key}.path", config.path, "no config.json in it; give the directory or hub id of what is served"
    )


AUTO = "auto"
"""teacher.backend: what is at teacher.url, Megatron where it computes exactly what the model is, else transformers."""
BACKENDS: dict[str, BackendRow] = {
    "megatron": BackendRow(_megatron, _check_megatron),
    "transformers": BackendRow(_transformers, _check_transformers, one_process=True),
    "openai": BackendRow(_endpoint, _check_endpoint, one_process=True, elsewhere=True),
}
"""teacher.backend -> what runs teacher.path."""
