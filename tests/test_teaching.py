"""What the trainer asks the teacher: in the teacher's own tokens, and back on the student's."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from inference.client import TeacherHidden, TeacherScore
from inference.packing import Group
from training.experience import Prompt, Rollout
from training.teaching import TeacherFacts, TeacherLink, chosen_logprobs, teacher_facts

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


def test_with_two_tokenizers_the_teacher_reads_its_own_tokens(tmp_path: Path) -> None:
    student, teacher = tokenizer(tmp_path / "s", 300, "<end>"), tokenizer(tmp_path / "t", 280, "</s>")
    facts = teacher_facts(tmp_path / "t", tmp_path / "s")
    assert not facts.same_tokenizer
    listener = Listener()
    link = TeacherLink(listener, facts, None)  # type: ignore[arg-type]
    view = link.ask(rollout(student, ["Tórshavn", "Keypmannahavn"], [True, False]), whole_distribution=False)()
    (group,) = listener.groups
    assert group.prompt == tuple(teacher(TEXTS[0])["input_ids"])
    first, second = group.responses
    # The student's end symbol became the teacher's; a response that was cut has none (trap 16).
    assert first == (*teacher(" Tórshavn")["input_ids"], teacher.eos_token_id)
    assert second == tuple(teacher(" Keypmannahavn")["input_ids"])
    # Each response's total, on its last student token, preserved exactly.
    n, m = len(first), len(second)
    assert view.logprobs_BR.sum(1).tolist() == [-n * (n + 1) / 2, -sum(range(n + 1, n + m + 1))]
    assert (view.logprobs_BR != 0).sum(1).tolist() == [1, 1]
    assert view.scored_tokens == n + m
    assert view.hidden_SD is None


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
