"""A user's mistake is exit code 2 and one message that names key, value and mend, before any model loads."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.checks import names_setting, validate
from configs.io.results import read_result
from configs.schema import RunConfig
from tests.support.forked import finish_forked
from tests.support.runs import command, metrics
from tests.support.student_models import save
from tests.support.teacher_models import save_tokenizer
from tests.support.teacher_servers import SECRET, served
from tests.support.tiny_tokenizers import save_tiny
from training.main import main
from training.run.cli import instantiate, make_parser

QUESTION = {"question": "Hvat eitur høvuðsstaðurin?", "answers": ["Tórshavn"]}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the real entry point in this process; the message that it ends with."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--actor.lerning_rate", "1e-3"], ["--actor.lerning_rate", "did you mean actor.learning_rate?"]),
        (["--steps", "many"], ["steps", "many"]),
        (["--steps", "0"], ["steps", "0", "at least 1"]),
        (["--algo", "dpo"], ["algo", "dpo", "grpo"]),
        (["--config", "no/such.yaml"], ["no/such.yaml"]),
        (["--sampling.group_size", "1"], ["sampling.group_size", "1", "at least 2"]),
        (["--sampling.teacher_mix", "1.5"], ["sampling.teacher_mix", "1.5", "below 1"]),
        (["--data.template", "Svar:"], ["data.template", "{question}"]),
        (["--data.template", "{context}\n{question}"], ["data.template", "leave {context} out"]),
        (["--data.template", r"{question}\nSvar:"], ["data.template", "a backslash and an n there"]),
        (["--rewards.format_pattern", "a{99999999999}"], ["rewards.format_pattern", "no regular expression"]),
        (["--loss.pt_coef", "1", "--data.text", "null"], ["loss.pt_coef", "data.text"]),
        (["--student.path", "/no/such/model"], ["student.path", "/no/such/model", "no such directory"]),
        (["--teacher.path", "/no/such/model"], ["teacher.path", "/no/such/model", "no such directory"]),
        (["--student.path", "nobody/nothing"], ["student.path", "nobody/nothing", "give a local model directory"]),
        (["--teacher.tensor_parallel", "3"], ["teacher.tensor_parallel", "3", "heads"]),
        (["--data.prompts", "/no/such.jsonl"], ["data.prompts", "/no/such.jsonl", "no such file"]),
        (["--name", "a/b"], ["name", "a/b", "runs_dir"]),
        (
            ["--student.adapter.rank", "4", "--student.adapter.four_bit", "true", "--eval.baseline", "runs/a/export"],
            ["eval.baseline = 'runs/a/export'", "which 4-bit weights cannot give up"],
        ),
        (["--runs_dir", "~/runs"], ["runs_dir = '~/runs'", "write the whole path"]),
        (["--runs_dir", "${SCRATCH}/runs"], ["runs_dir = '${SCRATCH}/runs'", "write the whole path"]),
    ],
)
def test_one_message(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = refused(capsys, "--runs_dir", str(tmp_path), "--cache_dir", str(tmp_path), *arguments)
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == [], "nothing is built for a run that cannot be"


def test_unknown_keys_in_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    top, nested = tmp_path / "top.yaml", tmp_path / "nested.yaml"
    top.write_text("stepz: 3\n")
    nested.write_text("actor:\n  lr: 1\n")
    assert "stepz' is not accepted; did you mean steps? (" in refused(capsys, "--config", str(top))
    message = refused(capsys, "--config", str(nested))
    assert "actor" in message
    assert "lr" in message
    assert "did you mean" not in message
    near = {"sampling: {max_tokens: 5}": "sampling.max_new_tokens", "learning_rate: 1": "actor.learning_rate or"}
    for wrong, right in near.items():
        top.write_text(wrong)
        assert f"did you mean {right}" in refused(capsys, "--config", str(top))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: {prompts: mine.jsonl}\nsteps: 5\ndata: {text: my.jsonl}\n", "line 3: key 'data' is there twice"),
        ("actor:\n  offload: true\n  zero_stage: 1\n  offload: false\n", "line 4: key 'offload' is there twice"),
        ("steps: 5\ndata:\n", "data: nothing stands below it"),
        ("steps: 5\nteachers:\n", "teachers: nothing stands below it"),
        ("rewards:\n  judge:\n", "rewards.judge: nothing stands below it"),
        ("student: [mine]\n", "student = ['mine']: write its settings below it"),
        ("actor: true\n", "actor = True: write its settings below it"),
        ("", "my.yaml: no settings in it"),
        ("- steps: 3\n", "my.yaml: no settings in it"),
        ("steps: null\n", "steps = None: give it a value, or leave it out"),
        ("student: {path: null}\n", "student.path = None: give it a value, or leave it out"),
        ("student: {chat_template_kwargs: }\n", "student.chat_template_kwargs: nothing stands below it"),
        ("name: 2024-13-45\n", "my.yaml: month must be in 1..12"),
        ("name: " + "[" * 5_000, "my.yaml: maximum recursion depth exceeded"),
        ("student: {chat_template_kwargs: &x {a: [*x]}}\n", "my.yaml: found unconstructable recursive node"),
    ],
)
def test_no_section_of_yaml_is_lost_or_empty(
    content: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(content)
    assert message in refused(capsys, "--config", str(file))
    assert message in refused(capsys, f"--config={file}")


def test_numbers_that_would_mean_something_else() -> None:
    parser = make_parser("test")
    for setting in (
        "eval.questions 0", "eval.questions -3", "threads 0", "actor.warmup_steps -5", "actor.max_skipped 0",
        "rewards.length_alpha .nan", "rewards.gamma 1.5", "rewards.custom_weight .nan", "grpo.epsilon 0",
        "ppo.gamma -1", "ppo.gae_lambda 2", "ppo.kl_penalty -0.1", "ppo.kl_target 0", "ppo.value_clip -1",
        "teacher.max_cache_tokens -1", "seed 4294967296", "actor.learning_rate .inf", "sft.learning_rate .inf",
        "critic.learning_rate .inf", "sampling.temperature .inf", "loss.kl_coef .inf", "ppo.kl_penalty .inf",
    ):  # fmt: skip
        key, value = setting.split()
        with pytest.raises(ValueError, match=rf"^{key} = {value.removeprefix('.')}.*: must "):
            validate(instantiate(parser, [f"--{key}={value}"]))


def test_model_directories_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, "--student.path", str(tmp_path))
    assert f"student.path = '{tmp_path}': no config.json" in message
    (tmp_path / "config.json").write_text("{}")
    assert "no weights" in refused(capsys, "--student.path", str(tmp_path))


def test_a_real_teachers_heads_are_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    teacher = save("llama", tmp_path / "teacher")
    save_tokenizer(teacher)
    capsys.readouterr()
    message = refused(capsys, "--teacher.path", str(teacher), "--teacher.tensor_parallel", "3")
    assert "teacher.tensor_parallel = 3: must divide the 4 attention heads" in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "the file has no row"),
        (json.dumps(QUESTION) + "\n{'x'\n", ":2: not JSON"),
        ('{"answers": ["x"]}\n', ":1: key 'question' is missing"),
    ],
)
@pytest.mark.parametrize("key", ["data.prompts", "data.warmup", "data.heldout"])
def test_malformed_jsonl_names_file_and_line(
    key: str, content: str, part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    message = refused(capsys, f"--{key}", str(path))
    assert message.startswith(f"error: {key}: ")
    assert f"{path}" in message
    assert part in message


def test_all_prompts_too_long_is_an_error_and_some_are_skipped(tmp_path: Path, train: Callable[..., Any]) -> None:
    long, short = {**QUESTION, "question": "orð " * 300}, QUESTION
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps(long) for _ in range(8)))
    data = ["--data.prompts", str(path), "--steps", "1"]
    done = train(tmp_path, *data, code=2)
    assert "all 8 prompts are longer than" in done.stderr
    assert "Traceback" not in done.stderr
    path.write_text("\n".join([json.dumps(long)] + [json.dumps({**short, "id": str(i)}) for i in range(8)]))
    done = train(tmp_path, *data, "--data.heldout", str(path))
    assert "prompts are too long and are skipped (the longest has" in done.stderr
    (before,) = tmp_path.glob("**/eval/before.json")
    measured = read_result(before).data
    assert (measured["rows"], measured["of"]) == (8, 9)  # the F1 is of those, and says so


def test_a_port_that_is_taken_is_named_with_a_free_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        message = refused(capsys, "--runs_dir", str(tmp_path), "--cache_dir", str(tmp_path))
    assert f"--master_port {port}: Address already in use" in message
    free = int(message.split("deepspeed --master_port ")[1].split()[0])
    assert free != port
    assert list(tmp_path.iterdir()) == []


def test_a_text_of_few_blocks_is_used_as_it_is(tmp_path: Path) -> None:
    """loss.pt_batch is 8, and the text has fewer blocks: each step reads them all, and the log says so."""
    for name, seed in (("student", 0), ("teacher", 1)):
        save_tiny(tmp_path / name, "byte_level", seed)
    rows, text = tmp_path / "rows.jsonl", tmp_path / "text.txt"
    rows.write_text("".join(json.dumps({**QUESTION, "id": str(i)}) + "\n" for i in range(8)))
    text.write_text("Føroyar eru 18 oyggjar í Norðuratlantshavi, og høvuðsstaðurin eitur Tórshavn.\n" * 2)
    paths = {"student.path": "student", "teacher.path": "teacher", "data.text": "text.txt"}
    paths |= {"data.prompts": "rows.jsonl", "data.heldout": "rows.jsonl"}
    small = ["--data.text_block_tokens", "64", "--sampling.max_new_tokens", "4", "--steps", "2"]
    settings = [word for key, name in paths.items() for word in (f"--{key}", str(tmp_path / name))]
    with served(tmp_path / "teacher", tmp_path) as there:
        line = command(tmp_path / "runs", tmp_path / "cache", *settings, *small, *there)
        done = finish_forked(line, GRPO_KD_TEACHER_SECRET=SECRET)
    assert f"loss.pt_batch = 8: data.text = '{text}' has " in done.stderr
    assert "blocks of data.text_block_tokens; each step takes all" in done.stderr
    steps = metrics(tmp_path / "runs" / "grpo-minillm")
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["loss/pt"] > 0 for row in steps)


def test_an_uneven_share_of_prompts_is_refused(demo_cache: Path, tmp_path: Path) -> None:
    done = finish_forked(command(tmp_path, demo_cache), code=2, WORLD_SIZE="3", RANK="0", LOCAL_RANK="0")
    assert "prompts_per_step = 8: must be a multiple of the 3 ranks" in done.stderr


@pytest.mark.parametrize(("program", "more"), [("main.py", ()), ("sft.py", ("--sft.answers", "data"))])
def test_a_setting_that_only_the_loaded_model_can_refuse_is_named(
    program: str, more: tuple[str, ...], demo_cache: Path, tmp_path: Path
) -> None:
    wrong = ("--student.adapter.rank", "2", "--student.adapter.targets", "lm_head,q_proj")
    stage2 = command(tmp_path, demo_cache, *wrong, *more)
    done = finish_forked([word.replace("main.py", program) for word in stage2], code=2)
    assert "student.adapter.targets = 'lm_head,q_proj': lm_head is the embedding" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_an_error_that_begins_with_a_setting_is_a_mistake_in_the_input() -> None:
    for said in ("student.adapter.targets = 'x': no", "teachers[0].path: no", "student.path = 'a b':\n no"):
        assert names_setting(RunConfig(), ValueError(said))
    for said in ("", "no weights for w", "steps do not fit", "student.size = 3: no", "rewards", "1 = 2", "a.b: c"):
        assert not names_setting(RunConfig(), ValueError(said))


def test_a_likeness_to_answers_needs_answers(demo_cache: Path, tmp_path: Path) -> None:
    done = finish_forked(command(tmp_path, demo_cache, "--rewards.similarity_weight", "0.5"), code=2)
    assert "rewards.similarity_weight = 0.5: compares with the data's answers, which " in done.stderr
    assert "rl.jsonl lack" in done.stderr


def test_no_more_entries_than_the_teacher_has(demo_cache: Path, tmp_path: Path) -> None:
    done = finish_forked(command(tmp_path, demo_cache, "--loss.single_step_entries", "5000"), code=2)
    assert "error: loss.single_step_entries = 5000: the teacher's vocabulary has 512: set fewer" in done.stderr
