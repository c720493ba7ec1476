"""Sampling: from the right distribution, reproducible by (seed, step, prompt), recorded honestly."""

from __future__ import annotations

import pytest
import torch

from configs.schema import SamplingConfig
from inference.packing import groups_of, pack, scatter_responses
from tests.student_models import build, plain_logprobs, save
from training.policy import Policy, load_policy
from training.sampling import draw, prompt_generator, sample, truncate

PROMPTS = [(1, 2, 3, 4), (5, 6), (7, 8, 9)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(save("llama", tmp_path_factory.mktemp("student")), "float32").eval()


def generators(prompts: list[int], step: int = 0) -> list[torch.Generator]:
    return [prompt_generator(0, step, p) for p in prompts]


def test_recorded_logprobs_are_those_of_the_training_forward(policy: Policy) -> None:
    config = SamplingConfig(group_size=3, max_new_tokens=10, temperature=0.7)
    samples = sample(policy, PROMPTS, config, end_tokens=[2], generators=generators([0, 1, 2]))
    rows = pack(groups_of(PROMPTS, samples.responses, 3), 20)
    with torch.no_grad():
        values = [policy(row, temperature=0.7).logprobs_S for row in rows]
    again = scatter_responses(rows, values, 9, samples.full_logprobs_BR.shape[1])
    assert torch.allclose(again, samples.full_logprobs_BR, atol=1e-4)
    assert torch.equal(samples.full_logprobs_BR, samples.drawn_logprobs_BR)


def test_logprobs_are_at_the_sampling_temperature(policy: Policy) -> None:
    """Trap 7: with plain-softmax log-probabilities the ratio would not start at 1."""
    config = SamplingConfig(group_size=2, max_new_tokens=4, temperature=0.5)
    samples = sample(policy, PROMPTS[:1], config, end_tokens=[2], generators=generators([0]))
    model = build("llama")
    for response, logprobs in zip(samples.responses, samples.full_logprobs_BR, strict=True):
        with torch.no_grad():
            want = plain_logprobs(model, PROMPTS[0], response, temperature=0.5)
        assert torch.allclose(logprobs[: len(want)], want, atol=1e-4)


def test_truncated_sampling_records_both_distributions(policy: Policy) -> None:
    """Trap 8: the drawn distribution is the full one renormalised over what was kept."""
    config = SamplingConfig(group_size=8, max_new_tokens=3, top_k=5)
    samples = sample(policy, PROMPTS, config, end_tokens=[2], generators=generators([0, 1, 2]))
    model = build("llama")
    checked = 0
    for b, response in enumerate(samples.responses):
        with torch.no_grad():
            first = model(torch.tensor([PROMPTS[b // 8]])).logits[0, -1].log_softmax(-1)
        kept = first.topk(5)
        assert response[0] in kept.indices.tolist()
        renormalised = first[response[0]] - kept.values.logsumexp(0)
        assert float(samples.drawn_logprobs_BR[b, 0]) == pytest.approx(float(renormalised), abs=1e-4)
        assert float(samples.full_logprobs_BR[b, 0]) == pytest.approx(float(first[response[0]]), abs=1e-4)
        checked += 1
    assert checked == 24


def test_a_prompt_is_sampled_alike_whoever_shares_its_batch(policy: Policy) -> None:
    config = SamplingConfig(group_size=2, max_new_tokens=8)
    together = sample(policy, PROMPTS, config, end_tokens=[2], generators=generators([0, 1, 2]))
    alone = sample(policy, PROMPTS[2:], config, end_tokens=[2], generators=generators([2]))
    assert together.responses[4:] == alone.responses
    other_step = sample(policy, PROMPTS[2:], config, end_tokens=[2], generators=generators([2], step=1))
    assert other_step.responses != alone.responses


def test_members_of_a_group_differ(policy: Policy) -> None:
    """Trap 20: a group of equal responses has no signal."""
    samples = sample(
        policy, PROMPTS[:1], SamplingConfig(group_size=8, max_new_tokens=6), end_tokens=[2], generators=generators([0])
    )
    assert len(set(samples.responses)) > 4


def test_the_end_symbol_is_kept_and_a_cut_response_is_not_finished(policy: Policy) -> None:
    """Trap 15: no end symbol is forced on a response that was cut."""
    ends = list(range(10, 25))
    samples = sample(
        policy,
        PROMPTS,
        SamplingConfig(group_size=4, max_new_tokens=5),
        end_tokens=ends,
        generators=generators([0, 1, 2]),
    )
    assert samples.finished_B.any()
    assert not samples.finished_B.all()
    for response, finished in zip(samples.responses, samples.finished_B.tolist(), strict=True):
        assert (response[-1] in ends) == finished
        assert not any(token in ends for token in response[:-1])
        assert finished or len(response) == 5


def test_greedy_equals_transformers_generate(policy: Policy) -> None:
    samples = sample(policy, PROMPTS, SamplingConfig(group_size=1, max_new_tokens=9), end_tokens=[2], generators=None)
    model = build("llama")
    for prompt, response in zip(PROMPTS, samples.responses, strict=True):
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
    samples = sample(
        policy, PROMPTS, config, end_tokens=everything, generators=generators([0, 1, 2]), any_rank=any_rank
    )
    assert forwards == [False, False, False, False]
    assert [len(r) for r in samples.responses] == [1] * 6


def test_draw_inverts_the_cumulative_distribution() -> None:
    logprobs = torch.tensor([[0.1, 0.0, 0.6, 0.3, 0.0]]).log().expand(6, -1)
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 1.0 - 1e-12], dtype=torch.float64)
    assert draw(logprobs, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_top_p_keeps_the_smallest_set_with_enough_mass() -> None:
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = truncate(logprobs, top_k=0, top_p=0.7).exp()
    assert torch.allclose(kept, torch.tensor([[0.625, 0.375, 0.0, 0.0]]), atol=1e-6)
    assert torch.allclose(truncate(logprobs, top_k=1, top_p=1.0).exp(), torch.tensor([[1.0, 0, 0, 0]]))


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest() -> None:
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]]).log()
    # A third of 0.5 is 0.167: 0.5 and 0.3 stay, 0.625 and 0.375 of what is left. Equals all stay.
    kept = truncate(logprobs, top_k=0, top_p=1.0, min_p=1 / 3).exp()
    assert torch.allclose(kept, torch.tensor([[0.625, 0.375, 0.0, 0.0], [0.25] * 4]), atol=1e-6)
    # After top-k 3 nothing changes for min-p: only ratios to the likeliest count.
    both = truncate(logprobs[:1], top_k=3, top_p=1.0, min_p=0.2).exp()
    assert torch.allclose(both, torch.tensor([[0.5, 0.3, 0.15, 0.0]]) / 0.95, atol=1e-6)


def test_min_p_is_sampled_from_and_both_distributions_are_recorded(policy: Policy) -> None:
    config = SamplingConfig(group_size=8, max_new_tokens=1, min_p=0.5)
    samples = sample(policy, PROMPTS[:1], config, end_tokens=[2], generators=generators([0]))
    with torch.no_grad():
        first = build("llama")(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    mass = first[first >= 0.5 * first.max()].sum()
    for (token,), full, drawn in zip(
        samples.responses, samples.full_logprobs_BR[:, 0], samples.drawn_logprobs_BR[:, 0], strict=True
    ):
        assert first[token] >= 0.5 * first.max()
        assert float(full) == pytest.approx(float(first[token].log()), abs=1e-4)
        assert float(drawn) == pytest.approx(float((first[token] / mass).log()), abs=1e-4)


def test_draw_never_reaches_past_the_last_token_with_mass() -> None:
    logprobs = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    assert draw(logprobs, torch.tensor([1.0], dtype=torch.float64)).tolist() == [1]


def test_sampled_frequencies_follow_the_distribution(policy: Policy) -> None:
    config = SamplingConfig(group_size=4000, max_new_tokens=1)
    samples = sample(policy, PROMPTS[1:2], config, end_tokens=[2], generators=generators([1]))
    counts = torch.bincount(torch.tensor([r[0] for r in samples.responses]), minlength=50) / 4000
    with torch.no_grad():
        expected = build("llama")(torch.tensor([PROMPTS[1]])).logits[0, -1].softmax(-1)
    # Standard error of a frequency is at most 0.008.
    assert float((counts - expected).abs().max()) < 0.035
