"""One model through EuroEval's Faroese tasks: EuroEval's own steps, kept as they finish, and the result file.

The file (OUTPUT/euroeval.json; scores in EuroEval's scale, percent or 100 times a correlation):

    {"model": str, "kind": "base" | "instruct", "harness": {package: version}, "device": str, "seconds": float,
     "settings": {"iterations": n, "split": "val" | "test", "few_shot": bool, "dtype": str, "batch": n},
     "tasks": {TASK: {
        "metrics": {METRIC: {"mean": x, "ci95": radius or null, "scores": [one an iteration]}},
        "data": {"source": "hub" | "local" | "demo", "id": str, "revision": str or null,
                 "sha256": {split: hex}, "rows": {split: n}},
        "comparable": bool, "why_not": str or null,      with EuroEval's leaderboard
        "truncated": prompts that were too long for the model, "seconds": float, "key": what it depends on,
        "generations": path of a JSONL, relative to OUTPUT: iteration, prompt, generation, prediction, gold}}}

OUTPUT/euroeval/ holds the generations, EuroEval's own euroeval_benchmark_results.jsonl, and while a task goes on what
it has generated so far: the same call again goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.files import write_atomically
from eval.euroeval_data import TASKS, Row, Source, endpoint, fingerprint, sentences_with_entities, stage

RESULT = "euroeval.json"
LEADERBOARD_ITERATIONS = 10
PACKAGES = ("euroeval", "transformers", "torch", "datasets", "scikit-learn", "seqeval")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the tasks are put."""

    tasks: tuple[str, ...]
    """Names out of eval.euroeval_data.TASKS."""
    iterations: int = LEADERBOARD_ITERATIONS
    """Bootstrap samples of the data, each with its own examples."""
    split: str = "test"
    """test or val."""
    few_shot: bool = True
    """Show examples."""
    kind: str | None = None
    """base or instruct; None: instruct where the tokenizer has a chat template."""
    dtype: str | None = None
    """Parameter and compute type; None: float32, bfloat16 on CUDA."""
    batch: int = 16
    """Rows generated at a time."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A task's data, loaded once."""

    config: Any
    """EuroEval's DatasetConfig; from the hub unmodified, else with another source."""
    about: dict[str, Any]
    """`data` of the result file."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One model that is being evaluated."""

    engine: Any
    """eval.euroeval_model.Engine."""
    name: str
    """As the user calls it."""
    kind: str
    """base or instruct."""
    settings: Settings
    work: Path
    """Folder of what belongs to the result file."""
    cache_dir: Path
    """Where `datasets` keeps its own."""


# --- data ----------------------------------------------------------------------------------------------------------


def dataset_configs() -> dict[str, Any]:
    """The installed EuroEval's Faroese configurations by name."""
    from euroeval.dataset_configs import get_all_dataset_configs

    every = get_all_dataset_configs(custom_datasets_file=Path("custom_datasets.py"))
    return {name: config for name, config in every.items() if "fo" in [one.code for one in config.languages]}


def load_data_set(name: str, source: Source, folder: Path | None, work: Path, cache_dir: Path) -> DataSet:
    """A task's data from the hub, or from local splits that have been checked; ValueError where they do not come."""
    from euroeval.data_loading import load_raw_data

    from eval.euroeval_metrics import use_local_metrics

    config = dataset_configs()[name]
    identity, revision = str(config.source), None
    if folder is not None:
        identity = f"demo/{name}" if source == "demo" else str(folder / name)
        config = replace(config, source=str(stage(folder, work / "data", name).resolve()))
    use_local_metrics(config.task.metrics)
    try:
        if source == "hub":
            revision = _revision(identity)
        splits = load_raw_data(dataset_config=config, cache_dir=str(cache_dir))
    except Exception as error:  # the hub's clients raise nearly anything
        raise _lost(identity, source, error) from error
    about = {
        "source": source,
        "id": identity,
        "revision": revision,
        "sha256": {split: fingerprint(rows) for split, rows in splits.items()},
        "rows": {split: len(rows) for split, rows in splits.items()},
    }
    return DataSet(config=config, about=about)


def _revision(identity: str) -> str | None:
    from huggingface_hub import HfApi

    sha = HfApi(endpoint=endpoint()).dataset_info(identity, timeout=10).sha
    return None if sha is None else str(sha)


def _lost(identity: str, source: Source, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
    if source != "hub":
        return ValueError(f"{identity}: the data cannot be loaded ({reason})")
    return ValueError(
        f"{identity}: the hub ({endpoint()}) does not give it ({reason}); what is finished is kept, so give the same "
        "command again when the hub answers, or --data DIR with local splits"
    )


# --- one model -----------------------------------------------------------------------------------------------------


def evaluate(
    model_dir: Path, name: str, settings: Settings, source: Source, folder: Path | None, output: Path, cache_dir: Path
) -> dict[str, Any]:
    """Run all tasks that are not finished yet; the content of OUTPUT/euroeval.json.

    `name`: the model as the user calls it. `folder`: local splits, or None for the hub. ValueError names the mend.
    """
    import torch

    from eval.euroeval_model import Engine, load, prepare_tokenizer

    work = output / "euroeval"
    work.mkdir(parents=True, exist_ok=True)
    settings = replace(settings, dtype=settings.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"))
    model, tokenizer = load(model_dir, str(settings.dtype))
    kind = settings.kind or ("base" if tokenizer.chat_template is None else "instruct")
    if kind == "instruct" and tokenizer.chat_template is None:
        raise ValueError(f"--kind instruct: {name} has no chat template; leave the option out or say --kind base")
    prepare_tokenizer(tokenizer, model, kind)
    data = {task: load_data_set(task, source, folder, work, cache_dir) for task in settings.tasks}
    asked = {key: value for key, value in asdict(settings).items() if key not in ("tasks", "kind")}
    result: dict[str, Any] = {
        "model": name,
        "kind": kind,
        "harness": {package: version(package) for package in PACKAGES},
        "device": str(model.device),
        "settings": asked,
        "tasks": {},
        "seconds": 0.0,
    }
    identity = f"{_weights(model_dir)} {kind} {asked} {result['harness']}"
    keys = {task: _key(identity, one.about) for task, one in data.items()}
    tasks = {task: one for task, one in _finished(output).items() if one["key"] == keys.get(task)}
    engine = Engine(model, tokenizer, batch=settings.batch)
    session = Session(engine=engine, name=name, kind=kind, settings=settings, work=work, cache_dir=cache_dir)
    for number, task in enumerate(settings.tasks, start=1):
        if task not in tasks:
            tasks[task] = _run_task(session, data[task], keys[task], f"{task} ({number} of {len(settings.tasks)})")
        result["tasks"] = {one: tasks[one] for one in settings.tasks if one in tasks}
        result["seconds"] = round(sum(one["seconds"] for one in tasks.values()), 1)
        write_atomically(output / RESULT, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    shutil.rmtree(work / "data", ignore_errors=True)
    return result


def _finished(output: Path) -> dict[str, Any]:
    """Tasks that an earlier call finished."""
    try:
        return dict(json.loads((output / RESULT).read_text(encoding="utf-8"))["tasks"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _weights(model_dir: Path) -> str:
    """What tells that a directory holds another model now: names, sizes and times of its files."""
    files = sorted(file for file in model_dir.iterdir() if file.is_file())
    return " ".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)


def _key(identity: str, about: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{identity} {about['sha256']}".encode()).hexdigest()[:16]


def _run_task(session: Session, data: DataSet, key: str, title: str) -> dict[str, Any]:
    """EuroEval's steps of one model on one data set, as its Benchmarker makes them; the task of the result file."""
    from tqdm import tqdm

    from eval.euroeval_model import Recorder

    start, task = time.monotonic(), data.config.name
    engine, settings, work = session.engine, session.settings, session.work
    current = work / f"{task}-{key}"
    for leftover in work.glob(f"{task}-*"):
        if leftover != current:  # of an evaluation with other settings or another model
            shutil.rmtree(leftover)
    current.mkdir(exist_ok=True)
    engine.open_journal(current / "journal.jsonl")
    recorder = Recorder()
    total = settings.iterations * data.about["rows"][settings.split]
    with tqdm(total=total, desc=f"{session.name}: {title}", unit="row", dynamic_ncols=True) as bar:
        engine.progress = bar.update
        record, truncated = _harness(session, data.config, recorder, current)
        bar.update(total - bar.n)  # rows that a sample holds twice are answered once
    generations = work / f"{task}.jsonl"
    lines = (json.dumps(row, ensure_ascii=False) for row in recorder.rows)
    write_atomically(generations, "".join(f"{line}\n" for line in lines))
    record.append_to_results(results_path=work / "euroeval_benchmark_results.jsonl")
    shutil.rmtree(current)
    why_not = _why_not(engine.model, data, settings, truncated)
    return {
        "metrics": _metrics(data.config.task.metrics, record.results),
        "data": data.about,
        "comparable": not why_not,
        "why_not": "; ".join(why_not) or None,
        "truncated": truncated,
        "generations": f"euroeval/{generations.name}",
        "seconds": round(time.monotonic() - start, 1),
        "key": key,
    }


def _harness(session: Session, config: Any, recorder: Any, current: Path) -> tuple[Any, int]:
    """EuroEval's record of the task, and how many prompts it shortened."""
    import torch
    from euroeval.data_loading import load_data
    from euroeval.data_models import BenchmarkResult, ModelConfig
    from euroeval.enums import InferenceBackend, ModelType
    from euroeval.exceptions import HuggingFaceHubDown, InvalidBenchmark, InvalidModel
    from euroeval.generation import generate
    from euroeval.scores import log_scores
    from euroeval.utils import enforce_reproducibility

    from eval.euroeval_model import LocalModel

    benchmark, settings, name = _benchmark_config(session, config), session.settings, session.name
    model_config = ModelConfig(
        model_id=name, revision="main", param=None, task="text-generation", languages=[], merge=False,
        inference_backend=InferenceBackend.VLLM, model_type=ModelType.GENERATIVE, fresh=False,
        model_cache_dir=str(current), adapter_base_model_id=None,
    )  # fmt: skip
    rng = enforce_reproducibility()
    torch.use_deterministic_algorithms(False)  # a global switch, and generation is greedy
    try:
        samples = load_data(rng=rng, dataset_config=config, benchmark_config=benchmark)
        _check_draws(config, samples)
        model = LocalModel(
            session.engine,
            model_config=model_config,
            dataset_config=config,
            benchmark_config=benchmark,
            recorder=recorder,
        )
        prepared = model.prepare_datasets(datasets=samples, task=config.task)
        scores = generate(
            model=model,
            datasets=prepared,
            model_config=model_config,
            dataset_config=config,
            benchmark_config=benchmark,
        )
    except HuggingFaceHubDown as error:
        raise _lost(config.source, "hub", error) from error
    except (InvalidBenchmark, InvalidModel) as error:
        raise ValueError(f"{name}, {config.name}: EuroEval says: {' '.join(error.message.split())}") from error
    results = log_scores(
        dataset_name=config.logging_string, metrics=config.task.metrics, scores=scores, model_id=name,
        model_revision="main", model_param=None,
    )  # fmt: skip
    record = BenchmarkResult(
        dataset=config.name,
        task=config.task.name,
        languages=[language.code for language in config.languages],
        model=name,
        results=results,
        num_model_parameters=model.num_params,
        max_sequence_length=model.model_max_length,
        vocabulary_size=model.vocab_size,
        merge=False,
        generative=True,
        generative_type=model.generative_type.value,
        few_shot=settings.few_shot,
        validation_split=settings.split == "val",
    )
    return record, model.truncated


def _benchmark_config(session: Session, config: Any) -> Any:
    """EuroEval's settings."""
    from euroeval.data_models import BenchmarkConfig
    from euroeval.enums import GenerativeType

    return BenchmarkConfig(
        datasets=[config],
        languages=list(config.languages),
        finetuning_batch_size=1,
        raise_errors=True,
        cache_dir=str(session.cache_dir),
        api_key=None,
        api_base=None,
        api_version=None,
        progress_bar=False,
        save_results=False,
        device=session.engine.model.device,
        trust_remote_code=False,
        clear_model_cache=False,
        evaluate_test_split=session.settings.split == "test",
        few_shot=session.settings.few_shot,
        num_iterations=session.settings.iterations,
        gpu_memory_utilization=0.0,
        requires_safetensors=True,
        generative_type=GenerativeType.BASE if session.kind == "base" else GenerativeType.INSTRUCTION_TUNED,
        download_only=False,
        force=True,
        verbose=False,
        debug=False,
        run_with_cli=False,
    )


def _check_draws(config: Any, samples: Sequence[Any]) -> None:
    """EuroEval looks for examples with entities for ever where a sample holds too few."""
    if TASKS[config.name].kind != "entities":
        return
    for number, sample in enumerate(samples):
        rows: list[Row] = list(sample["train"])
        if (found := sentences_with_entities(rows)) < config.num_few_shot_examples:
            raise ValueError(
                f"{config.name}: iteration {number} draws {found} different training sentences with entities, and "
                f"{config.num_few_shot_examples} examples are shown; put more of them into train.jsonl"
            )


def _metrics(metrics: Sequence[Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """EuroEval's results by metric; the radius of the interval is not known from one iteration."""
    found = {}
    for metric in metrics:
        radius = results["total"][f"test_{metric.name}_se"]
        found[metric.name] = {
            "mean": results["total"][f"test_{metric.name}"],
            "ci95": None if math.isnan(radius) else radius,
            "scores": [metric.postprocessing_fn(scores[metric.name])[0] for scores in results["raw"]],
        }
    return found


def _why_not(model: Any, data: DataSet, settings: Settings, truncated: int) -> list[str]:
    """Reasons why the figures may not stand beside the leaderboard's."""
    reasons, task = [], TASKS[data.config.name]
    if data.about["source"] != "hub":
        reasons.append(f"the data are {data.about['source']}, not EuroEval's")
    if not task.official:
        reasons.append("not one of the leaderboard's data sets")
    if settings.iterations != LEADERBOARD_ITERATIONS:
        reasons.append(f"{settings.iterations} iterations, not {LEADERBOARD_ITERATIONS}")
    if settings.split != "test":
        reasons.append("the validation split")
    if not settings.few_shot:
        reasons.append("without examples")
    if truncated:
        reasons.append(f"{truncated} prompts were longer than the model's context and lost their beginning")
    if task.kind == "entities":
        reasons.append("the JSON of the answers is not enforced, as EuroEval does with vLLM")
    sampling = sorted(
        {"temperature", "top_p", "top_k", "repetition_penalty"} & set(model.generation_config.to_diff_dict())
    )
    if sampling:
        reasons.append(f"greedy, although the model's generation_config.json sets {', '.join(sampling)}")
    return reasons
