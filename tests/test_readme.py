"""What README and docs promise: their commands run or say what they need, their examples are read as they stand."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path

import pytest

from configs.checks import validate
from configs.schema import RunConfig
from tests.support.runs import ROOT, TINY, environment, finish
from tests.support.teacher_servers import SECRET
from training.data.preflight import check_world
from training.run.cli import TOOLS, load_config, make_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
OURS = ("bash", "deepspeed", "make", "python", "sbatch", "torchrun")
NEEDS = ("nothing", "a ", "an ", "data", "each ", "models", "root", "runs", "SLURM", "the ", "TRL")
"""What a cell of "needs" may begin with."""


MESSAGES = (
    "an answer ends with: ",
    "and each stands for the other",
    "updates in a row had a non-finite loss or score; stopped with a checkpoint",
    "groups with a non-finite score",
    "stopped at step ",
    "KL to the start of the run is ",
    "student: log-probabilities as sampled, as trained and as transformers has them are within ",
    "in every way of running the model",
    "vocabulary columns: not a token of both models",
    "set it to 0 or leave it out",
    "out of memory in phase ",
    "the teacher shares theirs",
    "not arrived: no sign of life",
    "sampling gathers them for each token, which is slow; take more ranks, or stage 2",
    "where every response carries its prompt",
    "is the embedding, or the output layer that is tied to it, and one update cannot be merged into both; leave it out",
    "was started with other settings (",
    "not what it was ",
    "the run goes on from ",
)


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Our own command lines, as words: in bash blocks, and in backticks at the start of a table row."""
    lines = [line.split("  #")[0].strip() for block in blocks(text, "bash") for line in block.splitlines()]
    for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        lines += re.findall(r"`([^`]*)`", cell)
    found = [shlex.split(line.split(" # ")[0]) for line in lines]
    found = [words[next((i for i, word in enumerate(words) if "=" not in word), 0) :] for words in found]
    return [words for words in found if len(words) > 1 and words[0] in OURS]


def script_of(words: list[str]) -> str:
    """The file that a command starts; of make, its target."""
    if words[0] == "make":
        return f"make {words[1]}"
    return next(word for word in words if word.endswith((".sh", ".py")))


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_every_command_names_a_file_and_settings_that_exist(page: str) -> None:
    known = {flag for action in make_parser("readme")._actions for flag in action.option_strings} | {*TOOLS}
    for words in commands({**PAGES, "README.md": README}[page]):
        script = script_of(words)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
            continue
        assert (ROOT / script).is_file(), words
        if script.endswith(("training/main.py", "run_stage2_grpo.sh", "run_stage2_ppo.sh", "run_pipeline.sh")):
            flags = [word.split("=")[0] for word in words[words.index(script) :] if word.startswith("--")]
            assert set(flags) <= known, words


def test_every_script_is_in_the_list_of_commands_with_what_it_needs() -> None:
    listed = {script_of(words) for words in commands(PAGES["commands.md"])}
    named = {script_of(words) for text in [README, *PAGES.values()] for words in commands(text)}
    assert named <= listed
    rows = [row for row in PAGES["commands.md"].splitlines() if row.startswith("| `")]
    assert len(rows) >= 40
    wrong = []
    for row in rows:
        _, command, _, needs, run_by, _ = (cell.strip() for cell in row.split("|"))
        assert needs.startswith(NEEDS), row
        if run_by.startswith("tests/") and not run_by.startswith("tests/gpu"):
            test = ROOT / run_by.split()[0]
            helpers = [
                f for f in [*test.parent.glob("*.py"), *(ROOT / "tests/support").glob("*.py")] if f.stem[:4] != "test"
            ]
            text = "".join(file.read_text(encoding="utf-8") for file in [test, *helpers])
            scripts = [Path(script_of(words)).stem for words in commands(f"{row}\n")]
            if not any(script in text for script in scripts):
                wrong.append((command, run_by))
        else:
            assert run_by in ("itself", "not run", "not run by a test", "tests/gpu (dry run)"), row
    assert not wrong


def test_the_benchmarks_import_names_that_exist() -> None:
    """No test runs them, and importing EuroEval takes long; so what they import of ours is looked up in its source."""
    for script in [*ROOT.glob("tests/benchmarks/*.py"), *ROOT.glob("tests/gpu/*.py")]:
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            source = ROOT / f"{(getattr(node, 'module', None) or '').replace('.', '/')}.py"
            if isinstance(node, ast.ImportFrom) and source.is_file():
                text = source.read_text(encoding="utf-8")
                for name in node.names:
                    defined = rf"^(class |def |from .*\b){name.name}\b|^(    )?{name.name}\b( =|:|,)"
                    assert re.search(defined, text, re.MULTILINE), f"{script.name}: {node.module}.{name.name}"


def test_a_page_is_found() -> None:
    """The README stays short, the index has every page, and no link leads nowhere."""
    assert len(README.splitlines()) <= 120
    for name in PAGES.keys() - {"index.md"}:
        assert f"]({name})" in PAGES["index.md"], name
    for folder, text in [(ROOT, README), *((ROOT / "docs", page) for page in PAGES.values())]:
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / link).exists(), link


def test_the_claim_is_what_the_table_has() -> None:
    """README's comparison of GRPO with more of stage 1 is that of docs/results.md."""
    head, *rows = (row.split("|")[1:-1] for row in PAGES["results.md"].splitlines() if row.startswith("| "))
    found = {}
    for name in ("tuned", "more-stage1"):
        cells = next(row for row in rows if row[0].strip() == f"`{name}`")
        values = {title.strip(): cell.split("±")[0] for title, cell in zip(head, cells, strict=True)}
        found[name] = float(values["reverse KL (open)"]), 100 - float(values["right open answers"])
    (ours, wrong), (theirs, wrong_theirs) = found.values()
    said = README.replace("\n", " ")
    assert f"{ours / theirs:.0%} of the reverse KL".replace("%", " %") in said
    assert (
        f"({ours:.3f} against {theirs:.3f} nats a token, five seeds), {wrong:.1f} against {wrong_theirs:.1f} %" in said
    )


@pytest.mark.parametrize("page", ["README.md", "data.md", "following.md", "python.md", "troubleshooting.md"])
def test_settings_and_metrics_that_a_page_names_exist(page: str) -> None:
    """`section.key` is a setting, `--section.key` too, and `group/name` is written by the trainer."""
    text = {**PAGES, "README.md": README}[page]
    sections = "|".join(field.name for field in fields(RunConfig) if is_dataclass(getattr(RunConfig(), field.name)))
    for name in re.findall(rf"(?:`|--)((?:{sections})\.[a-z_.]+)(?![/\w(])", text):
        if not name.endswith((".md", ".py", ".html", ".jsonl", ".address")):
            assert attrgetter(name)(RunConfig()) is not Ellipsis, name
    trainer = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "training").rglob("*.py"))
    for name in re.findall(r"`((?:reward|kl|length|groups|tokens|mismatch|loss|seconds|eval)/\w+)`", text):
        group, key = name.split("/")
        assert f'"{name}' in trainer or (f'f"{group}/' in trainer and re.search(rf"\b{key}\b", trainer)), name


def test_messages_of_the_troubleshooting_page_are_the_programs_own() -> None:
    """Their fixed words, between what is filled in."""
    code = "".join(
        file.read_text(encoding="utf-8")
        for top in ("training", "inference", "configs")
        for file in (ROOT / top).rglob("*.py")
    )
    code = re.sub(r"\s+", " ", re.sub(r'"\s+f?"', "", code))
    for words in MESSAGES:
        assert words in code, words
        assert words in re.sub(r"\s+", " ", PAGES["troubleshooting.md"]), words


def test_the_yaml_example_is_a_valid_configuration(tmp_path: Path) -> None:
    (example,) = blocks(README, "yaml")
    path = tmp_path / "my.yaml"
    path.write_text(example)
    config = load_config(path)
    validate(config)
    check_world(config, 4)  # the four ranks of its command
    assert config.teacher.tensor_parallel == 4


@pytest.mark.parametrize(
    ("command", "run"),
    [
        (["bash", "slurm/run_stage2_grpo.sh"], "grpo-minillm"),
        (["bash", "slurm/run_stage2_ppo.sh", "--reward", "teacher_logprob"], "ppo-teacher_logprob"),
        (["deepspeed", "training/main.py", "--algo", "ppo", "--reward", "minillm"], "ppo-minillm"),
        (
            ["torchrun", "--standalone", "--nproc_per_node", "2", "training/main.py", "--seed", "1"],
            "grpo-minillm-seed1",
        ),
    ],
)
def test_stage_2_from_the_command_line(
    command: list[str], run: str, tmp_path: Path, demo_cache: Path, demo_teacher: tuple[str, ...]
) -> None:
    """The first as it stands, with a teacher of its own."""
    options = [*TINY, "--steps", "2", "--runs_dir", str(tmp_path), "--cache_dir", str(demo_cache)]
    served = () if run == "grpo-minillm" else demo_teacher
    done = finish([*command, *options, *served], GRPO_KD_TEACHER_SECRET=SECRET)
    assert json.loads((tmp_path / run / "summary.json").read_text())["status"] == "finished"
    assert "student after" in done.stdout
    assert (tmp_path / run / "report.html").is_file()


def test_stages_1_and_3_from_the_command_line(tmp_path: Path, demo_cache: Path) -> None:
    where = ["--runs_dir", str(tmp_path)]
    tiny = ["--demo_size", "tiny", "--cache_dir", str(demo_cache), "--threads", "1", "--sft.steps", "3"]
    tiny += ["--sft.samples", "2", "--eval.questions", "24"]  # the answers that test_run.py asks for, kept in the cache
    done = finish(["bash", "slurm/run_stage1_sft.sh", *tiny, *where])
    assert "stage 1: held-out F1" in done.stdout
    judged = importlib.util.find_spec("euroeval") is not None
    quick = ["--tasks", "fosent", "--iterations", "1", "--cache_dir", str(tmp_path / "cache")]
    done = finish(["bash", "slurm/run_stage3_eval.sh", *quick, *where], code=0 if judged else 2, timeout=1200)
    assert "exact_match" in done.stdout
    assert "macro_f1" in done.stdout if judged else "EuroEval is not installed; pip install" in done.stderr
    assert (tmp_path / "sft" / "eval" / "heldout.json").is_file()


def test_help_is_there_without_a_launcher() -> None:
    done = finish([environment()["PATH"].split(":")[0] + "/python", "training/main.py", "--help"])
    assert "--sampling.group_size" in done.stdout
    assert "Responses to each prompt" in " ".join(done.stdout.split()) or "responses to each prompt" in done.stdout
