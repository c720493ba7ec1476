"""One model through EuroEval's Faroese tasks: EuroEval's own steps, kept as they finish, and the result file.

Result (euroeval.json; scores in EuroEval's scale, percent or 100 times a correlation):

    values    TASK/METRIC with EuroEval's interval over the iterations; none for one iteration
    data      by TASK: source (hub, local, demo), id, revision, sha256 and rows by split
    rows      one a task: task; comparable and why_not, with EuroEval's leaderboard; truncated, prompts that were too
              long for the model; scores by METRIC, one an iteration; seconds; device; key, what it depends on;
              generations, path of a JSONL beside the file: iteration, prompt, generation, prediction, gold

The folder euroeval/ beside the result file holds the generations, EuroEval's own euroeval_benchmark_results.jsonl, and
while a task goes on what it has generated so far: the same call again goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from configs.io.files import write_atomically
from configs.io.results import Result, Value, read_result, versions
from configs.ranges import PositiveInt
from configs.schema import RunConfig
from eval.euroeval.data import OFFICIAL, TASKS, Row, Task, fingerprint, is_demo, stage
from eval.measures.model import Model

RESULT = "euroeval.json"
LEADERBOARD_ITERATIONS = 10
PACKAGES = ("euroeval", "transformers", "torch", "datasets", "scikit-learn", "seqeval")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the tasks are put, and where their data come from."""

    tasks: tuple[Task, ...] = OFFICIAL
    """Which; by default the official ones."""
    iterations: PositiveInt = LEADERBOARD_ITERATIONS
    """Bootstrap samples of the data, each with its own examples."""
    split: Literal["test", "val"] = "test"
    """Which split is scored."""
    zero_shot: bool = False
    """Show no examples."""
    kind: Literal["base", "instruct"] | None = None
    """By default instruct where there is a chat template."""
    data: Path | None = None
    """Folder with local splits. By default the demo's for its student, and the hub's for any other."""
    hub: bool = False
    """The hub's data for a model of the demo too."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """By default float32, or bfloat16 on CUDA."""
    batch: PositiveInt = 16
    """Rows generated at a time."""
    no_heldout: bool = False
    """Leave the run's own held-out questions out."""
    cache_dir: Path = Path(RunConfig().cache_dir) / "euroeval"
    """For the hub's data."""

    @property
    def source(self) -> Literal["hub", "local", "demo"]:
        """Whose the data are."""
        if self.data is None:
            return "hub"
        return "demo" if is_demo(self.data) else "local"


# --- data ----------------------------------------------------------------------------------------------------------


def dataset_configs() -> dict[str, Any]:
    """The installed EuroEval's Faroese configurations by name."""
    from euroeval.dataset_configs import get_all_dataset_configs

    every = get_all_dataset_configs(custom_datasets_file=Path("custom_datasets.py"))
    return {name: config for name, config in every.items() if "fo" in [one.code for one in config.languages]}


def load_data_set(name: str, settings: Settings, work: Path) -> tuple[Any, dict[str, Any]]:
    """A task's data from the hub, or from local splits that have been checked: EuroEval's DatasetConfig (from the hub
    unmodified, else with another source), and `data` of the result. ValueError where they do not come."""
    from euroeval.data_loading import load_raw_data

    from eval.euroeval.metrics import use_local_metrics

    config = dataset_configs()[name]
    identity, revision = str(config.source), None
    if settings.data is not None:
        identity = f"demo/{name}" if settings.source == "demo" else str(settings.data / name)
        config = replace(config, source=str(stage(settings.data, work / "data", name).resolve()))
    use_local_metrics(config.task.metrics)
    try:
        if settings.source == "hub":
            from huggingface_hub import HfApi

            revision = HfApi().dataset_info(identity, timeout=10).sha
        splits = load_raw_data(dataset_config=config, cache_dir=str(settings.cache_dir))
    except Exception as error:  # the hub's clients raise nearly anything
        raise _lost(identity, settings, error) from error
    about = {
        "source": settings.source,
        "id": identity,
        "revision": revision,
        "sha256": {split: fingerprint(rows) for split, rows in splits.items()},
        "rows": {split: len(rows) for split, rows in splits.items()},
    }
    return config, about


def _lost(identity: str, settings: Settings, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
    if settings.data is not None:
        return ValueError(f"{identity}: the data cannot be loaded ({reason})")
    return ValueError(
        f"{identity}: the hub does not give it ({reason}); what is finished is kept, so give the same "
        "command again when the hub answers, or --data DIR with local splits"
    )


# --- one model -----------------------------------------------------------------------------------------------------


def evaluate(model: Model, settings: Settings) -> Result:
    """Run all tasks that are not finished yet, and write the result file after each. ValueError names the mend."""
    from tqdm import tqdm

    from eval.euroeval.model import Engine, prepare_tokenizer

    name, output, work = model.path, model.folder / RESULT, model.folder / "euroeval"
    work.mkdir(parents=True, exist_ok=True)
    kind = settings.kind or ("base" if model.tokenizer.chat_template is None else "instruct")
    if kind == "instruct" and model.tokenizer.chat_template is None:
        raise ValueError(f"--kind instruct: {name} has no chat template; leave the option out or say --kind base")
    settings = replace(settings, kind=kind)
    prepare_tokenizer(model.tokenizer, model.network, kind)
    loaded = {task: load_data_set(task, settings, work) for task in settings.tasks}
    asked = {
        "kind": kind,
        "iterations": settings.iterations,
        "split": settings.split,
        "few_shot": not settings.zero_shot,
        "batch": settings.batch,
        "dtype": model.dtype,
    }
    result = Result(
        measure="euroeval", model=name, data={}, settings=asked, versions=versions(*PACKAGES), values={}, rows=[]
    )
    identity = f"{model.weights} {asked} {result.versions}"
    keys: dict[str, str] = {task: _key(identity, about) for task, (_, about) in loaded.items()}
    result = _with_finished(result, output, keys, identity)
    engine = Engine(model.network, model.tokenizer, batch=settings.batch)
    for number, (task, (config, about)) in enumerate(loaded.items(), start=1):
        if task not in result.data:
            rows = settings.iterations * about["rows"][settings.split]
            title = f"{name}: {task} ({number} of {len(settings.tasks)})"
            with tqdm(total=rows, desc=title, unit="row", dynamic_ncols=True) as bar:
                engine.progress = bar.update
                values, row = _run_task(engine, name, config, settings, work / f"{task}-{keys[task]}")
                bar.update(rows - bar.n)  # rows that a sample holds twice are answered once
            result = _with_task(result, about, values, {"task": task, **row, "key": keys[task]})
            result.write(output)
    result.write(output)
    shutil.rmtree(work / "data", ignore_errors=True)
    return result


def _with_task(result: Result, data: Mapping[str, Any], values: Mapping[str, Value], row: Row) -> Result:
    return replace(
        result,
        data={**result.data, row["task"]: data},
        values={**result.values, **values},
        rows=[*result.rows, row],
    )


def _with_finished(result: Result, output: Path, keys: Mapping[str, str], identity: str) -> Result:
    """With the tasks that an earlier call finished with the same keys, and those that are not asked for this time but
    were asked in the same way; none where its file cannot be read."""
    try:
        earlier = read_result(output)
        for row in earlier.rows:
            task = str(row["task"])
            if row["key"] == (keys.get(task) or _key(identity, earlier.data[task])):
                values = {key: value for key, value in earlier.values.items() if key.startswith(f"{task}/")}
                result = _with_task(result, earlier.data[task], values, dict(row))
    except (ValueError, KeyError, TypeError):
        pass
    return result


def _key(identity: str, about: Mapping[str, Any]) -> str:
    """Changes when the model, the way of asking, a version (`identity`) or the data do."""
    return hashlib.sha256(f"{identity} {about['sha256']}".encode()).hexdigest()[:16]


def _run_task(engine: Any, name: str, config: Any, settings: Settings, current: Path) -> tuple[dict[str, Value], Row]:
    """EuroEval's steps of one model on one data set: (values, row of the result).

    `current`: folder of what is generated while the task goes on; a killed call's is gone on with.
    """
    from eval.measures.generation import Journal

    start, task, work = time.monotonic(), config.name, current.parent
    for leftover in work.glob(f"{task}-*"):
        if leftover != current:  # of an evaluation with other settings or another model
            shutil.rmtree(leftover)
    current.mkdir(exist_ok=True)
    engine.journal = Journal(current / "journal.jsonl")
    record, local = _harness(engine, name, config, settings, current)
    generations = work / f"{task}.jsonl"
    write_atomically(generations, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in local.rows))
    record.append_to_results(results_path=work / "euroeval_benchmark_results.jsonl")
    shutil.rmtree(current)
    why_not = _why_not(engine.model, config, settings, local.truncated)
    metrics = config.task.metrics
    values = {f"{task}/{metric.name}": _value(record.results["total"], metric.name) for metric in metrics}
    return values, {
        "comparable": not why_not,
        "why_not": "; ".join(why_not) or None,
        "truncated": local.truncated,
        "generations": f"{work.name}/{generations.name}",
        "seconds": round(time.monotonic() - start, 1),
        "device": str(engine.model.device),
        "scores": {
            metric.name: [metric.postprocessing_fn(scores[metric.name])[0] for scores in record.results["raw"]]
            for metric in metrics
        },
    }


def _value(total: Mapping[str, float], metric: str) -> Value:
    """EuroEval's mean; the radius of its interval is not known from one iteration."""
    mean, radius = total[f"test_{metric}"], total[f"test_{metric}_se"]
    return Value(mean) if math.isnan(radius) else Value(mean, mean - radius, mean + radius)


def _harness(engine: Any, name: str, config: Any, settings: Settings, current: Path) -> tuple[Any, Any]:
    """EuroEval's record of the task, and the model that it asked."""
    from euroeval.benchmarker import Benchmarker
    from euroeval.data_models import ModelConfig
    from euroeval.enums import InferenceBackend, ModelType
    from euroeval.exceptions import InvalidBenchmark, InvalidModel

    from eval.euroeval.model import LocalModel

    benchmark_config = _benchmark_config(engine, config, settings)
    model_config = ModelConfig(
        model_id=name,
        revision="main",
        param=None,
        task="text-generation",
        languages=[],
        merge=False,
        inference_backend=InferenceBackend.VLLM,
        model_type=ModelType.GENERATIVE,
        fresh=False,
        model_cache_dir=str(current),
        adapter_base_model_id=None,
    )
    model = LocalModel(engine, model_config, config, benchmark_config)
    try:
        # Benchmarker's own method for one model on one data set; the rest of it finds models and writes caches.
        record = Benchmarker._benchmark_single(
            None, model, model_config, config, benchmark_config, num_finished_benchmarks=0, num_total_benchmarks=1
        )
    except (InvalidBenchmark, InvalidModel) as error:
        record = error
    if isinstance(record, InvalidBenchmark | InvalidModel):
        raise ValueError(f"{name}, {config.name}: EuroEval says: {' '.join(record.message.split())}")
    return record, model


def _benchmark_config(engine: Any, config: Any, settings: Settings) -> Any:
    """EuroEval's settings."""
    from euroeval.data_models import BenchmarkConfig
    from euroeval.enums import GenerativeType

    return BenchmarkConfig(
        datasets=[config],
        languages=list(config.languages),
        finetuning_batch_size=1,
        raise_errors=True,
        cache_dir=str(settings.cache_dir),
        api_key=None,
        api_base=None,
        api_version=None,
        progress_bar=False,
        save_results=False,
        device=engine.model.device,
        trust_remote_code=False,
        clear_model_cache=False,
        evaluate_test_split=settings.split == "test",
        few_shot=not settings.zero_shot,
        num_iterations=settings.iterations,
        gpu_memory_utilization=0.0,
        requires_safetensors=True,
        generative_type=GenerativeType.BASE if settings.kind == "base" else GenerativeType.INSTRUCTION_TUNED,
        download_only=False,
        force=True,
        verbose=False,
        debug=False,
        run_with_cli=False,
    )


def _why_not(model: Any, config: Any, settings: Settings, truncated: int) -> list[str]:
    """Reasons why the figures may not stand beside the leaderboard's."""
    reasons, task = [], TASKS[config.name]
    if settings.source != "hub":
        reasons.append(f"the data are {settings.source}, not EuroEval's")
    if config.name not in OFFICIAL:
        reasons.append("not one of the leaderboard's data sets")
    if settings.iterations != LEADERBOARD_ITERATIONS:
        reasons.append(f"{settings.iterations} iterations, not {LEADERBOARD_ITERATIONS}")
    if settings.split != "test":
        reasons.append("the validation split")
    if settings.zero_shot:
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
