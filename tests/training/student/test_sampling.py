"""Sampling: from the right distribution, reproducible by (seed, step, prompt), recorded honestly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from configs.schema import SamplingConfig
from inference.attention.packing import groups_of, in_batch_order, pack, pack_row
from tests.support.student_models import build, plain_logprobs, save
from training.data.order import random_stream
from training.losses import OutputLayer, WholeDistribution, jsd_term, reverse_kl_term
from training.student.loading import load_policy
from training.student.policy import Policy
from training.student.sampling import BLOCK, Drawing, draw, sample

PROMPTS = [(1, 2, 3, 4), (5, 6), (7, 8, 9)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(save("llama", tmp_path_factory.mktemp("student")), "float32").eval()


def generators(prompts: list[int], step: int = 0) -> list[torch.Generator]:
    return [random_stream(0, step, p) for p in prompts]


def test_recorded_logprobs_are_those_of_the_training_forward(policy: Policy) -> None:
    config = SamplingConfig(group_size=3, max_new_tokens=10, temperature=0.7)
    samples = sample(policy, PROMPTS, config, Drawing([2], generators([0, 1, 2])))
    rows = pack(groups_of(PROMPTS, samples.responses_B, 3), 20)
    with torch.no_grad():
        values = [policy(row, temperature=0.7).logprobs_S for row in rows]
    assert torch.allclose(in_batch_order(rows, values), samples.behavior_logprobs_S, atol=1e-4)
    assert torch.equal(samples.behavior_logprobs_S, samples.sampled_logprobs_S)


def test_logprobs_are_at_the_sampling_temperature(policy: Policy) -> None:
    """Trap 7: with plain-softmax log-probabilities the ratio would not start at 1."""
    config = SamplingConfig(group_size=2, max_new_tokens=4, temperature=0.5)
    samples = sample(policy, PROMPTS[:1], config, Drawing([2], generators([0])))
    model = build("llama")
    with torch.no_grad():
        want = [plain_logprobs(model, PROMPTS[0], response, temperature=0.5) for response in samples.responses_B]
    assert torch.allclose(samples.behavior_logprobs_S, torch.cat(want), atol=1e-4)


def test_a_mixture_records_both_distributions(policy: Policy) -> None:
    """Trap 8: tokens come from the mixture with a uniform distribution, and the policy's own are kept beside."""

    def half_uniform(t: int, active: torch.Tensor, last: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        return (0.5 * logprobs.exp() + 0.5 / logprobs.shape[-1]).log()

    config = SamplingConfig(group_size=8, max_new_tokens=1)
    samples = sample(policy, PROMPTS[:1], config, Drawing([2], generators([0]), mixture=half_uniform))
    with torch.no_grad():
        first = build("llama")(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    chosen = torch.tensor([token for (token,) in samples.responses_B])
    assert torch.allclose(samples.behavior_logprobs_S, first[chosen].log(), atol=1e-4)
    assert torch.allclose(samples.sampled_logprobs_S, (0.5 * first[chosen] + 0.5 / len(first)).log(), atol=1e-4)


def test_a_prompt_is_sampled_alike_whoever_shares_its_batch(policy: Policy) -> None:
    config = SamplingConfig(group_size=2, max_new_tokens=8)
    together = sample(policy, PROMPTS, config, Drawing([2], generators([0, 1, 2])))
    alone = sample(policy, PROMPTS[2:], config, Drawing([2], generators([2])))
    assert together.responses_B[4:] == alone.responses_B
    other_step = sample(policy, PROMPTS[2:], config, Drawing([2], generators([2], step=1)))
    assert other_step.responses_B != alone.responses_B


def test_members_of_a_group_differ(policy: Policy) -> None:
    """Trap 20: a group of equal responses has no signal."""
    samples = sample(policy, PROMPTS[:1], SamplingConfig(group_size=8, max_new_tokens=6), Drawing([2], generators([0])))
    assert len(set(samples.responses_B)) > 4


def test_the_end_symbol_is_kept_and_a_cut_response_is_not_finished(policy: Policy) -> None:
    """Trap 15: no end symbol is forced on a response that was cut."""
    ends = list(range(10, 25))
    samples = sample(
        policy,
        PROMPTS,
        SamplingConfig(group_size=4, max_new_tokens=5),
        Drawing(ends, generators([0, 1, 2])),
    )
    assert samples.finished_B.any()
    assert not samples.finished_B.all()
    for response, finished in zip(samples.responses_B, samples.finished_B.tolist(), strict=True):
        assert (response[-1] in ends) == finished
        assert not any(token in ends for token in response[:-1])
        assert finished or len(response) == 5


def test_greedy_equals_transformers_generate(policy: Policy) -> None:
    samples = sample(policy, PROMPTS, SamplingConfig(group_size=1, max_new_tokens=9), Drawing([2], None))
    model = build("llama")
    for prompt, response in zip(PROMPTS, samples.responses_B, strict=True):
        with torch.no_grad():
            out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=9,
                                 do_sample=False, eos_token_id=2, pad_token_id=0)  # fmt: skip
        assert out[0, len(prompt) :].tolist() == list(response)


def test_ranks_keep_step_until_all_have_ended(policy: Policy) -> None:
    """Trap 23: with another rank still active, a rank whose responses have all ended goes on forwarding."""
    forwards = []
    votes = iter([True, True, True, False])

    def any_rank(active: bool) -> bool:
        forwards.append(active)
        return next(votes)

    everything = list(range(50))  # every token ends a response
    config = SamplingConfig(group_size=2, max_new_tokens=9)
    samples = sample(policy, PROMPTS, config, Drawing(everything, generators([0, 1, 2]), any_rank))
    assert forwards == [False, False, False, False]
    assert [len(r) for r in samples.responses_B] == [1] * 6


def test_draw_inverts_the_cumulative_distribution() -> None:
    logprobs = torch.tensor([[0.1, 0.0, 0.6, 0.3, 0.0]]).log().expand(6, -1)
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 1.0 - 1e-12], dtype=torch.float64)
    assert draw(logprobs, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_draw_never_reaches_past_the_last_token_with_mass() -> None:
    logprobs = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    assert draw(logprobs, torch.tensor([1.0], dtype=torch.float64)).tolist() == [1]


def test_sampled_frequencies_follow_the_distribution(policy: Policy) -> None:
    config = SamplingConfig(group_size=4000, max_new_tokens=1)
    samples = sample(policy, PROMPTS[1:2], config, Drawing([2], generators([1])))
    counts = torch.bincount(torch.tensor([r[0] for r in samples.responses_B]), minlength=50) / 4000
    with torch.no_grad():
        expected = build("llama")(torch.tensor([PROMPTS[1]])).logits[0, -1].softmax(-1)
    # Standard error of a frequency is at most 0.008.
    assert float((counts - expected).abs().max()) < 0.035


def test_columns_without_a_token_have_no_probability(tmp_path: Path) -> None:
    """Qwen's matrices are wider than its tokenizer: what is sampled and trained is the softmax over tokens."""
    path = save("llama", tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(path)
    wide = load_policy(path, "float32").eval()
    assert wide.unknown_V is not None
    assert wide.unknown_V.nonzero()[:, 0].tolist() == list(range(40, 50))
    wide.limit(35)  # a teacher with the same tokenizer and fewer rows
    streams = [random_stream(0, 0, n) for n in range(2)]
    settings = SamplingConfig(group_size=20, max_new_tokens=8, temperature=2.0)
    drawn = sample(wide, [(3, 4, 5), (7,)], settings, Drawing([2], streams))
    assert max(token for response in drawn.responses_B for token in response) < 35
    row = pack_row(groups_of([(3, 4, 5), (7,)], drawn.responses_B, 20))
    found = wide(row, temperature=2.0)
    torch.testing.assert_close(found.logprobs_S, drawn.behavior_logprobs_S, atol=1e-5, rtol=0)
    model = build("llama")
    for b in (0, 25):
        ids = torch.tensor([[*[(3, 4, 5), (7,)][b // 20], *drawn.responses_B[b]]])
        length = len(drawn.responses_B[b])
        logits = model(ids).logits[0, -length - 1 : -1, :35] / 2.0
        expected = logits.log_softmax(-1).gather(-1, ids[0, -length:, None])[:, 0]
        torch.testing.assert_close(found.logprobs_S.split([len(r) for r in drawn.responses_B])[b], expected)
    assert torch.isfinite(found.entropy_S).all()
    found.logprobs_S.sum().backward()
    head = wide.model.get_output_embeddings().weight.grad
    assert float(head[35:].abs().max()) == 0.0
    teacher = WholeDistribution(torch.randn(len(row.labels_S), 6), OutputLayer(torch.randn(50, 6), wide.unknown_V))
    for term in (reverse_kl_term(teacher), jsd_term(teacher, 0.0), jsd_term(teacher, 0.5)):
        value = wide(row, terms={"term": term}).terms["term"]
        assert torch.isfinite(value).all()
        assert float(value.max()) < 100


def test_blocks_of_the_vocabulary_draw_what_the_whole_cumulative_sum_draws() -> None:
    """Three blocks, the last one not full; the entries in front of and behind the last one with mass have none."""
    size = 2 * BLOCK + 100
    logits = 3.0 * torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    logits[:, :3] = logits[:, BLOCK : BLOCK + 40] = logits[:, -20:] = -torch.inf
    logits[3] = -torch.inf
    logits[3, BLOCK - 1] = logits[3, 2 * BLOCK] = 0.0
    logprobs = logits.log_softmax(-1)
    whole = logprobs.double().exp().cumsum(-1)
    for place in (0.0, 1e-12, 0.25, 0.499, 0.5, 0.75, 0.999, 1.0 - 2.0**-53):
        found = draw(logprobs, torch.full((4,), place, dtype=torch.float64))
        assert (logprobs.gather(1, found[:, None]) > -torch.inf).all()
        upper = whole.gather(1, found[:, None])[:, 0] / whole[:, -1]
        lower = upper - logprobs.double().exp().gather(1, found[:, None])[:, 0] / whole[:, -1]
        assert ((lower - 1e-6 <= place) & (place <= upper + 1e-6)).all()
    assert draw(logprobs[3:], torch.tensor([0.4]).double()).tolist() == [BLOCK - 1]
    assert draw(logprobs[3:], torch.tensor([0.6]).double()).tolist() == [2 * BLOCK]
