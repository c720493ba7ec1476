"""Packed rows: each prompt once, the same numbers as plain rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inference.attention.decode import DecodePlan
from inference.attention.grouped import ScoreRule, register_with_transformers
from inference.attention.packed import PackedPlan, PrefillPlan
from inference.attention.packing import Group, groups_of, in_batch_order, pack, pack_row
from tests.support.student_models import FAMILIES, build, plain_logprobs

PROMPTS = [(1, 2, 3, 4, 5, 6), (7, 8), (9,), tuple(range(20, 32))]
RESPONSES = [
    [(9, 10, 11, 12, 13), (14,), ()],
    [(20, 21, 22), (1, 2, 3, 4, 5, 6, 7), (3, 4)],
    [(5, 5), (6,), (7, 8, 9, 10)],
    [(11, 12), (13, 14), (15, 16)],
]
FLAT = [r for group in RESPONSES for r in group]


def test_rows_of_every_layout_are_put_to_the_test() -> None:
    groups = groups_of(PROMPTS, FLAT, 3)
    plans = [PackedPlan(row) for row in pack(groups, 1000) + pack(groups, 12)]
    # Padded and unpadded blocks; prompts of one token; a group with fewer responses that have inputs than another.
    blocks = [block for plan in plans for block in plan._blocks]
    assert {block.prompts.full for block in blocks} == {True, False}
    assert {block.responses.full for block in blocks if block.responses is not None} == {True, False}
    assert {plan._place_T is None for plan in plans} == {True, False}


def test_a_row_holds_each_prompt_once_and_no_last_response_token() -> None:
    row = pack_row([Group(prompt=(1, 2, 3), responses=((4, 5), (), (6,)), first_response=7)])
    assert row.tokens_T.tolist() == [1, 2, 3, 4]
    assert row.positions_T.tolist() == [0, 1, 2, 3]
    assert row.segments_T.tolist() == [0, 0, 0, 1]
    # Token 4 is predicted by the last prompt token, 5 by 4, and 6 by the last prompt token again.
    assert row.predict_S.tolist() == [2, 3, 2]
    assert row.labels_S.tolist() == [4, 5, 6]
    assert row.response_S.tolist() == [7, 7, 9]
    assert row.place_S.tolist() == [0, 1, 2]


def test_values_of_rows_come_back_in_batch_order() -> None:
    """Rows are filled longest group first, a row may be empty, and so may a batch."""
    rows = pack(groups_of(PROMPTS, FLAT, 3), 12)
    assert [row.place_S.tolist() for row in rows] != [sorted(row.place_S.tolist()) for row in rows] or len(rows) > 1
    labels_S = in_batch_order(rows, [row.labels_S for row in rows])
    assert labels_S.tolist() == [token for response in FLAT for token in response]
    spare = pack_row([Group(prompt=(0,), responses=())])
    assert in_batch_order([spare], [torch.zeros(0, 5)]).shape == (0, 5)
    assert len(in_batch_order([], [])) == 0


def test_foqa_shaped_work_is_a_fifth_of_plain_rows() -> None:
    group = Group(prompt=tuple(range(400)), responses=tuple(tuple(range(32)) for _ in range(8)))
    assert group.input_tokens == 400 + 8 * 31
    assert 8 * (400 + 32) / group.input_tokens > 5


def test_rows_respect_the_budget_and_a_long_group_stands_alone() -> None:
    groups = [Group(prompt=(1,) * n, responses=((1,),)) for n in (3, 10, 4, 2)]
    assert [row.group_lengths for row in pack(groups, 7)] == [(10,), (4, 3), (2,)]


def test_groups_of_refuses_a_wrong_count() -> None:
    with pytest.raises(ValueError, match="3 responses do not make 2 groups of 2"):
        groups_of([(1,), (2,)], [(1,), (2,), (3,)], 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [1000, 12])
def test_packed_logprobs_equal_plain_rows(family: str, budget: int) -> None:
    model = build(family)
    with torch.no_grad():
        expected = [plain_logprobs(model, PROMPTS[b // 3], r) for b, r in enumerate(FLAT)]
    model.set_attn_implementation(register_with_transformers())
    rows = pack(groups_of(PROMPTS, FLAT, 3), budget)
    values = []
    for row in rows:
        with torch.no_grad():
            logits = model(
                row.tokens_T[None], position_ids=row.positions_T[None], plan=PackedPlan(row), use_cache=False
            ).logits[0, row.predict_S]
        values.append(logits.log_softmax(-1).gather(-1, row.labels_S[:, None])[:, 0])
    assert torch.allclose(in_batch_order(rows, values), torch.cat(expected), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradients_equal_plain_rows_in_float64(family: str) -> None:
    weights = [
        torch.randn(len(r), dtype=torch.float64, generator=torch.Generator().manual_seed(b)) for b, r in enumerate(FLAT)
    ]
    weights_S = torch.cat(weights)
    model = build(family).double()
    plain = sum((plain_logprobs(model, PROMPTS[b // 3], r) * weights[b]).sum() for b, r in enumerate(FLAT) if r)
    plain.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation(register_with_transformers())
    total = torch.zeros((), dtype=torch.float64)
    for row in pack(groups_of(PROMPTS, FLAT, 3), 14):
        logits = model(
            row.tokens_T[None], position_ids=row.positions_T[None], plan=PackedPlan(row), use_cache=False
        ).logits[0, row.predict_S]
        chosen = logits.log_softmax(-1).gather(-1, row.labels_S[:, None])[:, 0]
        total = total + (chosen * weights_S[row.place_S]).sum()
    total.backward()
    # transformers keeps rotary angles in float32, which bounds the agreement.
    assert float(total.detach()) == pytest.approx(float(plain.detach()), abs=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_from_the_shared_prompt_equals_plain_rows(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        expected = [plain_logprobs(model, PROMPTS[b // 3], r) for b, r in enumerate(FLAT)]
    model.set_attn_implementation(register_with_transformers())
    row = pack_row([Group(prompt=p, responses=()) for p in PROMPTS])
    prefill = PrefillPlan(row)
    checked = 0
    with torch.no_grad():
        model(row.tokens_T[None], position_ids=row.positions_T[None], plan=prefill, use_cache=False)
        plan = DecodePlan(prefill.cache, group_size=3, max_new_tokens=8)
        for t in range(1, 8):
            active = torch.tensor([b for b, r in enumerate(FLAT) if len(r) > t])
            if not len(active):
                break
            fed = torch.tensor([[FLAT[b][t - 1] for b in active.tolist()]])
            positions = plan.advance(active)[None]
            logprobs = model(fed, position_ids=positions, plan=plan, use_cache=False).logits[0].log_softmax(-1)
            for i, b in enumerate(active.tolist()):
                assert float(logprobs[i, FLAT[b][t]]) == pytest.approx(float(expected[b][t]), abs=1e-5)
                checked += 1
    assert checked == sum(max(len(r) - 1, 0) for r in FLAT)


def test_groups_that_have_finished_leave_the_cache_of_decoding() -> None:
    """Whichever groups end first: what decoding attends to is what the dense formula attends to."""
    stream = torch.Generator().manual_seed(0)
    lengths, G, steps = (9, 3, 2, 5), 2, 6
    ends = [2, 1, 6, 5, 1, 1, 3, 6]  # tokens of each response
    row = pack_row([Group(prompt=tuple(range(n)), responses=()) for n in lengths])
    for window in (None, 4):
        prefill = PrefillPlan(row)
        rule = ScoreRule(0.3, window)
        prompt = [torch.randn(sum(lengths), n, 8, generator=stream, dtype=torch.float64) for n in (4, 2, 2)]
        prefill.attend(0, *prompt, rule)
        plan, held = DecodePlan(prefill.cache, G, steps), []
        keys = [list(part) for part in prompt[1].split(lengths) for _ in range(G)]
        values = [list(part) for part in prompt[2].split(lengths) for _ in range(G)]
        for step in range(steps):
            active = [b for b, end in enumerate(ends) if end > step]
            positions = plan.advance(torch.tensor(active))
            assert positions.tolist() == [lengths[b // G] + step for b in active]
            query, key, value = (
                torch.randn(len(active), n, 8, generator=stream, dtype=torch.float64) for n in (4, 2, 2)
            )
            out = plan.attend(0, query, key, value, rule)
            for i, b in enumerate(active):
                keys[b].append(key[i])
                values[b].append(value[i])
                seen = slice(None if window is None else max(len(keys[b]) - window, 0), None)
                k, v = (torch.stack(one[b][seen]).repeat_interleave(2, 1) for one in (keys, values))
                weights = (torch.einsum("hd,thd->ht", query[i], k) * 0.3).softmax(-1)
                assert torch.allclose(out[i], torch.einsum("ht,thd->hd", weights, v), atol=1e-12)
            held.append((plan._prompts.lengths, plan._prompts.longest))
        # Groups 0 and 2 have ended after two tokens, and nobody needs 9 columns any more.
        assert held[:2] == [(lengths, 9)] * 2
        assert held[2:] == [((3, 5), 5)] * 4


def test_decoding_never_copies_the_prompt_cache(tmp_path: Path) -> None:
    model = build("llama")
    model.set_attn_implementation(register_with_transformers())
    row = pack_row([Group(prompt=p, responses=()) for p in PROMPTS])
    prefill = PrefillPlan(row)
    with torch.no_grad():
        model(row.tokens_T[None], position_ids=row.positions_T[None], plan=prefill, use_cache=False)
        before = {layer: key.data_ptr() for layer, key in prefill.cache.keys.items()}
        plan = DecodePlan(prefill.cache, group_size=2, max_new_tokens=3)
        positions = plan.advance(torch.arange(6))
        model(torch.ones(1, 6, dtype=torch.int64), position_ids=positions[None], plan=plan, use_cache=False)
    assert {layer: key.data_ptr() for layer, key in prefill.cache.keys.items()} == before
    assert prefill.cache.keys[0].shape[0] == len(PROMPTS)


def test_a_plan_past_its_slots_is_an_error() -> None:
    prefill = PrefillPlan(pack_row([Group(prompt=(1, 2), responses=())]))
    plan = DecodePlan(prefill.cache, group_size=1, max_new_tokens=1)
    plan.advance(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="past the 1 preallocated"):
        plan.advance(torch.zeros(1, dtype=torch.int64))
