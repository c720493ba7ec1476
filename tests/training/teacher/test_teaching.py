"""What the trainer asks the teacher: in the teacher's own tokens, and back on the student's."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from configs.models import StudentConfig, TeacherConfig
from configs.prompts import Format
from configs.schema import DataConfig, RunConfig
from inference.attention.packing import Group
from tests.support.experiences import rollout_of
from tests.support.tokenizer_zoo import build
from training.data.prompts import answer_group, format_of, load_prompts
from training.experience import Prompt, Rollout
from training.losses import OutputLayer
from training.teacher.facts import TeacherFacts, check_tokenizers, teacher_facts
from training.teacher.link import TeacherLink, chosen_logprobs
from training.teacher.token_bytes import TokenBytes

TEXTS = ["Spurningur: Hvat eitur høvuðsstaðurin?\nSvar:", " Tórshavn", " Keypmannahavn", "Svar: Tórshavn er ein býur."]


def tokenizer(directory: Path, vocabulary: int, end: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXTS * 5, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[end], initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end)
    made.save_pretrained(directory)
    return made


class Listener:
    """A teacher that remembers what it was asked and gives each token -1, -2, ... nats in batch order."""

    def __init__(self, max_positions: int = 1000) -> None:
        self.groups: Sequence[Group] = ()
        self.max_positions = max_positions

    def info(self) -> Any:
        return SimpleNamespace(eos_ids=(), max_positions=self.max_positions)

    def score(self, groups: Sequence[Group]) -> Future[torch.Tensor]:
        self.groups = groups
        out: Future[torch.Tensor] = Future()
        out.set_result(-torch.arange(1, sum(len(r) for g in groups for r in g.responses) + 1, dtype=torch.float32))
        return out

    def hidden(self, groups: Sequence[Group]) -> Future[torch.Tensor]:
        self.groups = groups
        out: Future[torch.Tensor] = Future()
        out.set_result(torch.eye(16)[: sum(len(r) for g in groups for r in g.responses)])
        return out


def facts_of(folder: Path, **data: Any) -> TeacherFacts:
    """What is known of the teacher folder/t beside the student folder/s."""
    config = RunConfig(
        student=StudentConfig(path=str(folder / "s")), teacher=TeacherConfig(path=str(folder / "t")),
        data=DataConfig(**data),
    )  # fmt: skip
    return teacher_facts(config, config.teacher)


def rollout(student: PreTrainedTokenizerFast, texts: list[str], finished: list[bool]) -> Rollout:
    """One prompt whose responses are these texts."""
    end = student.eos_token_id
    responses = [
        (*student(" " + t, add_special_tokens=False)["input_ids"], *([end] if f else []))
        for t, f in zip(texts, finished, strict=True)
    ]
    prompt = Prompt(0, TEXTS[0], tuple(student(TEXTS[0])["input_ids"]), ("Tórshavn",), "Hvat?")
    return replace(rollout_of([prompt], responses), finished_B=torch.tensor(finished), texts_B=texts)


def byte_ends(made: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[int]:
    """Where each token ends, in bytes; the end symbol one behind the text (its bytes: the tokenizer's letters)."""
    words = [t for t in made.convert_ids_to_tokens(list(ids)) if t != made.eos_token]
    ends = list(accumulate(len(word) for word in words))
    return [*ends, 10**6][: len(ids)]


def test_with_two_tokenizers_the_teacher_reads_its_own_tokens(tmp_path: Path) -> None:
    student, teacher = tokenizer(tmp_path / "s", 300, "<end>"), tokenizer(tmp_path / "t", 280, "</s>")
    facts = facts_of(tmp_path)
    assert not facts.same_tokenizer
    listener = Listener()
    link = TeacherLink(listener, facts, None)  # type: ignore[arg-type]
    asked = rollout(student, ["Tórshavn", "Keypmannahavn"], [True, False])
    view = link.ask(asked, whole_distribution=False)()
    (group,) = listener.groups
    assert group.prompt == tuple(teacher(TEXTS[0])["input_ids"])
    first, second = group.responses
    # The student's end symbol became the teacher's; a response that was cut has none (trap 16).
    assert first == (*teacher(" Tórshavn")["input_ids"], teacher.eos_token_id)
    assert second == tuple(teacher(" Keypmannahavn")["input_ids"])
    # Each response's total is preserved, and each token has what the teacher's tokens that end in it got.
    n, m = len(first), len(second)
    by_response = view.logprobs_S.split(asked.lengths_B.tolist())
    assert [float(v.sum()) for v in by_response] == [-n * (n + 1) / 2, -sum(range(n + 1, n + m + 1))]
    scores = [-float(i) for i in range(1, n + m + 1)]
    for b, (words, own) in enumerate(zip(asked.responses_B, (first, second), strict=True)):
        ours, theirs = byte_ends(student, words), byte_ends(teacher, own)
        expected = [
            sum(s for s, end in zip(scores[b * n :], theirs, strict=False) if before < end <= here)
            for before, here in zip([0, *ours], ours, strict=False)
        ]
        assert by_response[b].tolist() == expected
        assert sum(value != 0 for value in expected) > 1
    assert view.scored_tokens_B.tolist() == [n, m]
    assert view.unread_tokens_B.tolist() == [0, 0]
    assert view.hidden_SD is None


def test_the_teacher_reads_what_was_written(tmp_path: Path) -> None:
    """No space is put in front, and what the text shows stripped is not stripped; a cut character is left out."""
    student, teacher = tokenizer(tmp_path / "s", 300, "<end>"), tokenizer(tmp_path / "t", 280, "</s>")
    listener = Listener()
    link = TeacherLink(listener, facts_of(tmp_path), None)  # type: ignore[arg-type]
    asked = rollout(student, ["Tórshavn", "x"], [False, False])
    written = [tuple(student("Tórshavn\n\n")["input_ids"]), tuple(student(" ó")["input_ids"])]
    assert len(written[1]) == 3, "a space and two bytes"
    asked = replace(asked, responses_B=[written[0], written[1][:2]])
    view = link.ask(asked, whole_distribution=False)()
    (group,) = listener.groups
    assert group.responses == (tuple(teacher("Tórshavn\n\n")["input_ids"]), tuple(teacher(" ")["input_ids"]))
    assert view.unread_tokens_B.tolist() == [0, 1]
    assert float(view.logprobs_S[-1]) == 0.0


def test_a_response_that_outgrows_the_teachers_context_has_no_score(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = tokenizer(tmp_path / "s", 300, "<end>"), tokenizer(tmp_path / "t", 280, "</s>")
    asked = rollout(student, ["Tórshavn", "Tórshavn Keypmannahavn"], [True, True])
    room = len(teacher(TEXTS[0])["input_ids"]) + len(teacher(" Tórshavn")["input_ids"]) + 1
    listener = Listener(room)  # the prompt, the short one and its end fill it
    link = TeacherLink(listener, facts_of(tmp_path), None)  # type: ignore[arg-type]
    view = link.ask(asked, whole_distribution=False)()
    (group,) = listener.groups
    assert [len(response) for response in group.responses] == [len(teacher(" Tórshavn")["input_ids"]) + 1, 0]
    known, unknown = view.logprobs_S.split(asked.lengths_B.tolist())
    assert bool(known.isfinite().all())
    assert bool(unknown.isnan().all())
    assert view.scored_tokens_B.tolist() == [len(group.responses[0]), 0]
    link.ask(asked, whole_distribution=False)()
    assert caplog.text.count(f"whose context has {room}; such responses have no score") == 1


def test_each_side_has_its_own_chat_template(tmp_path: Path) -> None:
    student, teacher = tokenizer(tmp_path / "s", 300, "<end>"), tokenizer(tmp_path / "t", 280, "</s>")
    student.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}[svar]"
    turn = "{% for m in messages %}<{{ m['content'] }}>{% if m['role'] == 'assistant' %}!</s>{% endif %}{% endfor %}"
    teacher.chat_template = turn + "{% if add_generation_prompt %}=>{% endif %}"
    student.save_pretrained(tmp_path / "s")
    teacher.save_pretrained(tmp_path / "t")
    rows = tmp_path / "rows.jsonl"
    data = DataConfig(prompts=str(rows), template="Hvat er {question}?")
    rows.write_text('{"question": "Havn", "answers": ["ein býur"]}\n', encoding="utf-8")
    (prompt,) = load_prompts("data.prompts", data, Format(student, "auto"), room=100, need_answers=True)
    assert student.decode(prompt.tokens) == "[user] Hvat er Havn?[svar]"
    listener = Listener()
    link = TeacherLink(listener, facts_of(tmp_path), None)  # type: ignore[arg-type]
    asked = replace(rollout(student, ["Tórshavn"], [True]), prompts_N=[prompt])
    link.ask(asked, whole_distribution=False)()
    (group,) = listener.groups
    assert teacher.decode(group.prompt) == "<Hvat er Havn?>=>"
    # With one tokenizer, too: the teacher may be the chat model of the student's family.
    other = TeacherLink(listener, replace(facts_of(tmp_path), same_tokenizer=True), None)  # type: ignore[arg-type]
    other.ask(asked, whole_distribution=False)()
    assert listener.groups[0].prompt == group.prompt
    assert listener.groups[0].responses == tuple(asked.responses_B)
    # Text begins an answer in a chat, a space does behind a plain prompt.
    end = student.eos_token_id
    assert answer_group(prompt, "já", Format(student, "auto")).responses == ((*student("já")["input_ids"], end),)
    assert answer_group(prompt, "já", Format(student)).responses == ((*student(" já")["input_ids"], end),)
    assert answer_group(prompt, "já", Format(student), ended=False).responses == (tuple(student(" já")["input_ids"]),)


@pytest.mark.parametrize("kind", ["llama", "gemma", "byte_level", "sentencepiece"])
def test_an_answer_to_imitate_begins_with_one_space(kind: str, tmp_path: Path) -> None:
    made = build(kind, tmp_path)
    prompt = Prompt(0, "Svar:", (1, 2), (), "")
    ((*words, end),) = answer_group(prompt, "Havn", Format(made, model_ends=(7,))).responses
    assert end == (7 if made.eos_token_id is None else made.eos_token_id)
    pieces = TokenBytes(made, kind)
    assert b"".join(pieces.piece(t) for t in words) == b" Havn"


def test_what_ends_an_answer_in_a_chat(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, 300, "</s>")
    made.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    end, turn = made.convert_tokens_to_ids(["</s>", "<turn>"])
    made.chat_template = "{% for m in messages %}{{ m['content'] }} <turn>\n{% endfor %}"
    assert Format(made, "chat").end == turn
    made.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert Format(made, "chat").end == end


def test_a_chat_template_that_is_missing_or_fails_is_named(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, 300, "<end>")
    with pytest.raises(ValueError, match=r"student.prompt = 'chat': the tokenizer in .* has no chat template"):
        format_of("student", StudentConfig(path=str(tmp_path), prompt="chat"), DataConfig())
    assert not format_of("student", StudentConfig(path=str(tmp_path)), DataConfig()).chat
    made.chat_template = "{{ raise_exception('Only user roles') }}"
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"teacher.path = .*: its chat template failed \(Only user roles\)"):
        format_of("teacher", TeacherConfig(path=str(tmp_path)), DataConfig())


def test_with_one_tokenizer_tokens_go_as_they_are(tmp_path: Path) -> None:
    student = tokenizer(tmp_path / "s", 300, "<end>")
    student.save_pretrained(tmp_path / "t")
    facts = facts_of(tmp_path)
    assert facts.same_tokenizer
    listener = Listener()
    link = TeacherLink(listener, facts, None)  # type: ignore[arg-type]
    asked = rollout(student, ["Tórshavn", "Keypmannahavn"], [True, True])
    view = link.ask(asked, whole_distribution=True)()
    assert list(listener.groups) == asked.groups()
    lengths = [len(r) for r in asked.responses_B]
    assert view.logprobs_S.tolist() == [-float(i) for i in range(1, sum(lengths) + 1)]


def test_hidden_states_and_output_layer_give_the_log_probabilities(tmp_path: Path) -> None:
    student = tokenizer(tmp_path / "s", 300, "<end>")
    student.save_pretrained(tmp_path / "t")
    output_VD = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    listener = Listener()
    link = TeacherLink(listener, replace(facts_of(tmp_path), same_tokenizer=True), OutputLayer(output_VD))  # type: ignore[arg-type]
    asked = rollout(student, ["Tórshavn"], [True])
    view = link.ask(asked, whole_distribution=True)()
    assert view.hidden_SD is not None
    for t, token in enumerate(asked.responses_B[0]):
        assert float(view.logprobs_S[t]) == pytest.approx(float(output_VD.T[t].log_softmax(-1)[token]), abs=1e-5)
    labels = torch.tensor(asked.responses_B[0])
    whole = chosen_logprobs(view.hidden_SD, OutputLayer(output_VD), labels)
    assert torch.allclose(chosen_logprobs(view.hidden_SD, OutputLayer(output_VD), labels, chunk=1), whole)


def base_and_instruct(folder: Path) -> tuple[PreTrainedTokenizerFast, TeacherFacts]:
    """A base student's tokenizer, and a teacher with the same tokens that ends its turns otherwise (Qwen3-8B-Base and
    Qwen3-32B)."""
    student = tokenizer(folder / "s", 300, "<end>")
    student.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    student.save_pretrained(folder / "s")
    student.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}<turn>{% endfor %}"
    student.save_pretrained(folder / "t")
    return student, facts_of(folder)


def test_a_base_students_end_stands_for_an_instruct_teachers(tmp_path: Path) -> None:
    student, facts = base_and_instruct(tmp_path)
    assert facts.same_tokenizer
    end, turn = student.convert_tokens_to_ids(["<end>", "<turn>"])
    assert facts.exchanged == {end: turn, turn: end}
    listener = Listener()
    link = TeacherLink(listener, facts, None)  # type: ignore[arg-type]
    asked = rollout(student, ["Tórshavn", "Havn"], [True, False])
    link.ask(asked, whole_distribution=False)()
    (group,) = listener.groups
    assert group.responses == ((*asked.responses_B[0][:-1], turn), asked.responses_B[1])
    assert group.prompt == facts.teacher.prompt(TEXTS[0])
    assert group.prompt[0] == turn


@pytest.mark.parametrize("template", ["Svar:", "Svar:\n"])
def test_an_answer_that_begins_with_a_space_for_one_of_them_is_said(
    template: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The teacher would write `Havn` where the student writes ` Havn`, which is another token. Behind a line break
    both write the same, and an answer to imitate has no space there."""
    student, _ = base_and_instruct(tmp_path)
    facts = facts_of(tmp_path, template=f"{{question}} {template}")
    check_tokenizers(RunConfig(), "teacher.path", facts)
    assert ("teacher.path: student and teacher have one tokenizer, but" in caplog.text) == (template == "Svar:")
    words = facts.student.answer("Havn")
    assert student.decode(words) == (" Havn" if template == "Svar:" else "Havn")
    listener = Listener()
    two = TeacherLink(listener, replace(facts, same_tokenizer=False), None)  # type: ignore[arg-type]
    asked = replace(rollout(student, ["Havn"], [True]), responses_B=[(*words, facts.student.end)])
    two.ask(asked, whole_distribution=False)()
    assert student.decode(listener.groups[0].responses[0]) == "Havn<turn>", "with two it is as the teacher writes"
    caplog.clear()
    check_tokenizers(RunConfig(), "teacher.path", replace(facts, teacher=facts.student))
    assert not caplog.text


@pytest.mark.parametrize("same", [True, False])
def test_an_answer_of_the_teacher_that_was_cut_gets_no_end(same: bool, tmp_path: Path) -> None:
    student, facts = base_and_instruct(tmp_path)
    if not same:
        facts = replace(facts, same_tokenizer=False)
    end, turn = student.convert_tokens_to_ids(["<end>", "<turn>"])
    whole = tuple(student("Tórshavn", add_special_tokens=False)["input_ids"])
    cut = (*student("S", add_special_tokens=False)["input_ids"], *student(" ó", add_special_tokens=False)["input_ids"])
    cut = cut[:-1]  # a letter of two bytes loses one

    class Writer(Listener):
        def info(self) -> Any:
            return SimpleNamespace(eos_ids=(end,), max_positions=1000)

        def generate(self, prompts: Any, *, eos_ids: Sequence[int], **_: Any) -> Any:
            assert set(eos_ids) == {end, turn}
            out: Future[Any] = Future()
            out.set_result([(*whole, turn), cut])
            return out

    link = TeacherLink(Writer(), facts, None)  # type: ignore[arg-type]
    prompts = [Prompt(i, TEXTS[0], (1, 2), (), "") for i in range(2)]
    assert link.answer(prompts, 8) == [("Tórshavn", True), ("S", False)]
    (first, ended), (second, unfinished) = link.responses(prompts, 30, temperature=0.0, seed=0)
    assert (ended, unfinished) == (True, False)
    assert first[-1] == end
    assert end not in second
    assert turn not in second
