"""What the trainer asks the teacher: in the teacher's own tokens, and back on the student's."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from configs.models import StudentConfig, TeacherConfig
from configs.schema import DataConfig, RunConfig
from inference.client import TeacherHidden, TeacherScore
from inference.packing import Group
from tests.tokenizer_zoo import build
from training.data import answer_group, load_prompts
from training.experience import Prompt, Rollout
from training.teaching import (
    TeacherFacts,
    TeacherLink,
    check_tokenizers,
    chosen_logprobs,
    end_of_turn,
    teacher_facts,
)
from training.token_bytes import TokenBytes

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

    def __init__(self) -> None:
        self.groups: Sequence[Group] = ()

    def score(self, groups: Sequence[Group]) -> Future[TeacherScore]:
        self.groups = groups
        lengths = torch.tensor([len(r) for g in groups for r in g.responses])
        out: Future[TeacherScore] = Future()
        out.set_result(TeacherScore(lengths, -torch.arange(1, int(lengths.sum()) + 1, dtype=torch.float32)))
        return out

    def hidden(self, groups: Sequence[Group]) -> Future[TeacherHidden]:
        self.groups = groups
        lengths = torch.tensor([len(r) for g in groups for r in g.responses])
        out: Future[TeacherHidden] = Future()
        out.set_result(TeacherHidden(lengths, torch.eye(16)[: int(lengths.sum())]))
        return out


def rollout(student: PreTrainedTokenizerFast, texts: list[str], finished: list[bool]) -> Rollout:
    """One prompt whose responses are these texts."""
    end = student.eos_token_id
    responses = [
        (*student(" " + t, add_special_tokens=False)["input_ids"], *([end] if f else []))
        for t, f in zip(texts, finished, strict=True)
    ]
    longest = max(len(r) for r in responses)
    prompt = Prompt(0, TEXTS[0], tuple(student(TEXTS[0])["input_ids"]), ("Tórshavn",), "Hvat?")
    zeros = torch.zeros(len(texts), longest)
    return Rollout([prompt], len(texts), responses, torch.tensor(finished), zeros, zeros, texts)


def byte_ends(made: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[int]:
    """Where each token ends, in bytes; the end symbol one behind the text (its bytes: the tokenizer's letters)."""
    words = [t for t in made.convert_ids_to_tokens(list(ids)) if t != made.eos_token]
    ends = list(accumulate(len(word) for word in words))
    return [*ends, 10**6][: len(ids)]


def test_with_two_tokenizers_the_teacher_reads_its_own_tokens(tmp_path: Path) -> None:
    student, teacher = tokenizer(tmp_path / "s", 300, "<end>"), tokenizer(tmp_path / "t", 280, "</s>")
    facts = teacher_facts(tmp_path / "t", tmp_path / "s")
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
    assert view.logprobs_BR.sum(1).tolist() == [-n * (n + 1) / 2, -sum(range(n + 1, n + m + 1))]
    scores = [-float(i) for i in range(1, n + m + 1)]
    for b, (words, own) in enumerate(zip(asked.responses, (first, second), strict=True)):
        ours, theirs = byte_ends(student, words), byte_ends(teacher, own)
        expected = [
            sum(s for s, end in zip(scores[b * n :], theirs, strict=False) if before < end <= here)
            for before, here in zip([0, *ours], ours, strict=False)
        ]
        assert view.logprobs_BR[b, : len(words)].tolist() == expected
        assert sum(value != 0 for value in expected) > 1
    assert view.scored_tokens == n + m
    assert view.unread_tokens == 0
    assert view.hidden_SD is None


def test_the_teacher_reads_what_was_written(tmp_path: Path) -> None:
    """No space is put in front, and what the text shows stripped is not stripped; a cut character is left out."""
    student, teacher = tokenizer(tmp_path / "s", 300, "<end>"), tokenizer(tmp_path / "t", 280, "</s>")
    listener = Listener()
    link = TeacherLink(listener, teacher_facts(tmp_path / "t", tmp_path / "s"), None)  # type: ignore[arg-type]
    asked = rollout(student, ["Tórshavn", "x"], [False, False])
    written = [tuple(student("Tórshavn\n\n")["input_ids"]), tuple(student(" ó")["input_ids"])]
    assert len(written[1]) == 3, "a space and two bytes"
    asked = replace(asked, responses=[written[0], written[1][:2]], behavior_logprobs_BR=torch.zeros(2, 99))
    view = link.ask(asked, whole_distribution=False)()
    (group,) = listener.groups
    assert group.responses == (tuple(teacher("Tórshavn\n\n")["input_ids"]), tuple(teacher(" ")["input_ids"]))
    assert view.unread_tokens == 1
    assert float(view.logprobs_BR[1, 1]) == 0.0


def test_each_side_has_its_own_chat_template(tmp_path: Path) -> None:
    student, teacher = tokenizer(tmp_path / "s", 300, "<end>"), tokenizer(tmp_path / "t", 280, "</s>")
    student.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}[svar]"
    turn = "{% for m in messages %}<{{ m['content'] }}>{% if m['role'] == 'assistant' %}!</s>{% endif %}{% endfor %}"
    teacher.chat_template = turn + "{% if add_generation_prompt %}=>{% endif %}"
    student.save_pretrained(tmp_path / "s")
    teacher.save_pretrained(tmp_path / "t")
    data = replace(DataConfig(), use_chat_template=True, template="Hvat er {question}?")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Havn", "answers": ["ein býur"]}\n', encoding="utf-8")
    (prompt,), _ = load_prompts(rows, data, student, key="data.prompts", room=100, need_answers=True)
    assert student.decode(prompt.tokens) == "[user] Hvat er Havn?[svar]"
    listener = Listener()
    link = TeacherLink(listener, teacher_facts(tmp_path / "t", tmp_path / "s"), None)  # type: ignore[arg-type]
    asked = replace(rollout(student, ["Tórshavn"], [True]), prompts=[prompt])
    link.ask(asked, whole_distribution=False)()
    (group,) = listener.groups
    assert teacher.decode(group.prompt) == "<Hvat er Havn?>=>"
    # With one tokenizer, too: the teacher may be the chat model of the student's family.
    other = TeacherLink(listener, TeacherFacts(tmp_path / "t", True), None)  # type: ignore[arg-type]
    other.ask(asked, whole_distribution=False)()
    assert listener.groups[0].prompt == group.prompt
    assert listener.groups[0].responses == tuple(asked.responses)
    # Text begins an answer in a chat, a space does behind a plain prompt.
    assert answer_group(prompt, "já", student, 0).responses == ((*student("já")["input_ids"], 0),)
    plain = replace(prompt, chat=False)
    assert answer_group(plain, "já", student, 0).responses == ((*student(" já")["input_ids"], 0),)


@pytest.mark.parametrize("kind", ["llama", "gemma", "byte_level", "sentencepiece"])
def test_an_answer_to_imitate_begins_with_one_space(kind: str, tmp_path: Path) -> None:
    made = build(kind, tmp_path)
    prompt = Prompt(0, "Svar:", (1, 2), (), "")
    ((*words, end),) = answer_group(prompt, "Havn", made, 7).responses
    assert end == 7
    pieces = TokenBytes(made, kind)
    assert b"".join(pieces.piece(t) for t in words) == b" Havn"


def test_what_ends_an_answer_in_a_chat(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, 300, "</s>")
    made.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    end, turn = made.convert_tokens_to_ids(["</s>", "<turn>"])
    made.chat_template = "{% for m in messages %}{{ m['content'] }} <turn>\n{% endfor %}"
    assert end_of_turn(made) == turn
    made.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(made) == end


def test_a_chat_template_that_is_missing_is_named(tmp_path: Path) -> None:
    tokenizer(tmp_path / "s", 300, "<end>")
    tokenizer(tmp_path / "t", 280, "</s>")
    config = RunConfig(
        student=StudentConfig(path=str(tmp_path / "s")), teacher=TeacherConfig(path=str(tmp_path / "t")),
        data=DataConfig(use_chat_template=True),
    )  # fmt: skip
    facts = teacher_facts(tmp_path / "t", tmp_path / "s")
    with pytest.raises(ValueError, match=r"data.use_chat_template = True: student.path = .* without a chat template"):
        check_tokenizers(config, "teacher.path", facts)
    check_tokenizers(replace(config, data=DataConfig()), "teacher.path", facts)


def test_with_one_tokenizer_tokens_go_as_they_are(tmp_path: Path) -> None:
    student = tokenizer(tmp_path / "s", 300, "<end>")
    student.save_pretrained(tmp_path / "t")
    facts = teacher_facts(tmp_path / "t", tmp_path / "s")
    assert facts.same_tokenizer
    listener = Listener()
    link = TeacherLink(listener, facts, None)  # type: ignore[arg-type]
    asked = rollout(student, ["Tórshavn", "Keypmannahavn"], [True, True])
    view = link.ask(asked, whole_distribution=True)()
    assert list(listener.groups) == asked.groups()
    lengths = [len(r) for r in asked.responses]
    assert view.logprobs_BR[0, : lengths[0]].tolist() == [-float(i) for i in range(1, lengths[0] + 1)]
    assert view.logprobs_BR[1, 0] == -float(lengths[0] + 1)


def test_hidden_states_and_output_layer_give_the_log_probabilities(tmp_path: Path) -> None:
    student = tokenizer(tmp_path / "s", 300, "<end>")
    student.save_pretrained(tmp_path / "t")
    output_VD = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    listener = Listener()
    link = TeacherLink(listener, TeacherFacts(tmp_path / "t", True), output_VD)  # type: ignore[arg-type]
    asked = rollout(student, ["Tórshavn"], [True])
    view = link.ask(asked, whole_distribution=True)()
    assert view.hidden_SD is not None
    for t, token in enumerate(asked.responses[0]):
        assert float(view.logprobs_BR[0, t]) == pytest.approx(float(output_VD.T[t].log_softmax(-1)[token]), abs=1e-5)
    labels = torch.tensor(asked.responses[0])
    whole = chosen_logprobs(view.hidden_SD, output_VD, labels)
    assert torch.allclose(chosen_logprobs(view.hidden_SD, output_VD, labels, chunk=1), whole)
