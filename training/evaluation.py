"""The trainer's own evaluation on the held-out questions: SQuAD F1, exact match and reverse KL to the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from configs.schema import RunConfig
from rewards.answers import exact_match, token_f1
from training import distributed
from training.actor import Actor
from training.data import share_of_rank
from training.experience import Prompt
from training.teaching import TeacherLink

EVALUATION_STEP = 2**40
"""Step number of evaluation samples in their seeds, so that they repeat no training sample."""


@dataclass(frozen=True)
class Answer:
    """One held-out question with what was answered."""

    id: str
    question: str
    context: str | None
    answers: Sequence[str]
    prediction: str
    f1: float
    """0 to 100."""


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation said."""

    f1: float
    """Mean token F1 of greedy answers, 0 to 100."""
    exact_match: float
    """Mean exact match of greedy answers, 0 to 100."""
    reverse_kl: float
    """KL(model || teacher) in nats a token over the model's own sampled answers at temperature 1: exact over the
    vocabulary at each state with equal tokenizers, else log pi - log p_T of the samples (a token of the student)."""
    questions: int
    answers: Sequence[Answer]

    def scores(self) -> dict[str, float]:
        """The three numbers."""
        return {"f1": self.f1, "exact_match": self.exact_match, "reverse_kl": self.reverse_kl}

    def as_json(self, data: str) -> dict[str, object]:
        """For the run folder; `data` says what it was measured on."""
        return {
            **self.scores(),
            "questions": self.questions,
            "data": data,
            "answers": [asdict(a) for a in self.answers],
        }


def evaluate_student(actor: Actor, link: TeacherLink, prompts: Sequence[Prompt], config: RunConfig) -> Evaluation:
    """Greedy answers for F1 and exact match, sampled ones for the reverse KL. Collective: ranks share the questions."""
    return score_answers(prompts, greedy_answers(actor, prompts, config), reverse_kl(actor, link, prompts, config))


def greedy_answers(actor: Actor, prompts: Sequence[Prompt], config: RunConfig) -> list[str]:
    """The student's likeliest answers to all prompts, on every rank. Collective."""
    sampling = replace(config.sampling, group_size=1)
    texts: list[str] = []
    for asked, count in _shared_batches(prompts, config.eval.batch):
        texts += actor.sample(asked, step=EVALUATION_STEP, sampling=sampling, greedy=True).texts[:count]
    return distributed.gather_strings(texts)


def reverse_kl(actor: Actor, link: TeacherLink, prompts: Sequence[Prompt], config: RunConfig) -> float:
    """See `Evaluation.reverse_kl`. Collective."""
    sampling = replace(config.sampling, group_size=config.eval.kl_samples, temperature=1.0, top_k=0, top_p=1.0)
    kl_sum = tokens = 0.0
    for asked, count in _shared_batches(prompts, config.eval.batch):
        rollout = actor.sample(asked, step=EVALUATION_STEP, sampling=sampling)
        view = link.ask(rollout, whole_distribution=link.same_tokenizer)()
        if view.hidden_SD is not None:
            kl_BR = actor.teacher_kl(rollout, view.hidden_SD)
        else:
            kl_BR = torch.where(rollout.mask_BR, rollout.behavior_logprobs_BR - view.logprobs_BR, 0.0)
        if count:
            kl_sum += float(kl_BR.double().sum())
            tokens += float(rollout.lengths_B.sum())
    total = distributed.sum_metrics({"kl": kl_sum, "tokens": tokens})
    return total["kl"] / max(total["tokens"], 1.0)


def _shared_batches(prompts: Sequence[Prompt], batch: int) -> list[tuple[list[Prompt], int]]:
    """This rank's share in batches, with how many of each count. All ranks get the same number of batches: one that
    has run out repeats a question that does not count, because under ZeRO 3 its passes are the others' as well."""
    mine = share_of_rank(prompts, distributed.rank(), distributed.world_size())
    passes = int(distributed.max_over_ranks(-(-len(mine) // batch)))
    parts = [mine[i * batch : (i + 1) * batch] for i in range(passes)]
    return [(part or list(prompts[:1]), len(part)) for part in parts]


def evaluate_teacher(link: TeacherLink, prompts: Sequence[Prompt], config: RunConfig) -> Evaluation:
    """The teacher's greedy answers: the upper bound. Its reverse KL to itself is 0 by definition. Call on one rank."""
    predictions: list[str] = []
    for start in range(0, len(prompts), config.eval.batch):
        batch = prompts[start : start + config.eval.batch]
        predictions += link.answer(batch, config.sampling.max_new_tokens).result()
        distributed.beat()  # the other ranks wait
    return score_answers(prompts, predictions, 0.0)


def score_answers(prompts: Sequence[Prompt], predictions: Sequence[str], reverse_kl: float) -> Evaluation:
    """Put the answers beside the accepted ones."""
    answers = [
        Answer(p.id, p.question, p.context, p.answers, text, 100.0 * token_f1(text, p.answers))
        for p, text in zip(prompts, predictions, strict=True)
    ]
    exact = [100.0 * exact_match(text, p.answers) for p, text in zip(prompts, predictions, strict=True)]
    count = max(len(answers), 1)
    return Evaluation(
        f1=sum(a.f1 for a in answers) / count,
        exact_match=sum(exact) / count,
        reverse_kl=reverse_kl,
        questions=len(answers),
        answers=answers,
    )
