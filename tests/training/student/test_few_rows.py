"""Products of few rows through oneDNN: the same numbers, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.student import few_rows as module
from training.student.few_rows import MOST_ROWS, few_rows


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256), nn.Linear(256, 8))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("rows", [1, 7, MOST_ROWS, MOST_ROWS + 1])
def test_the_product_is_torchs(rows: int, dtype: torch.dtype, limit: float) -> None:
    model = layers().to(dtype)
    inputs = torch.randn(1, rows, 256).to(dtype)
    with torch.no_grad():
        expected = model(inputs)
        with few_rows(model, rows):
            known = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
            assert ("forward" in vars(model[0])) == (known and rows <= MOST_ROWS)
            assert "forward" not in vars(model[2])  # too small to be worth a copy
            found = model(inputs)
    torch.testing.assert_close(found.float(), expected.float(), atol=limit, rtol=limit)


def test_a_processor_without_bfloat16_keeps_torchs_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_bfloat16", lambda: False)
    for dtype, taken in ((torch.bfloat16, False), (torch.float32, True)):
        model = layers().to(dtype)
        with few_rows(model, 4):
            assert ("forward" in vars(model[0])) == taken


def test_new_weights_are_seen_the_next_time_and_gradients_flow_meanwhile() -> None:
    model, inputs = layers(), torch.randn(4, 256)
    with few_rows(model, 4):
        model(inputs).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model[0].weight.mul_(2.0)
        expected = model(inputs)
        with few_rows(model, 4):
            torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=1e-5)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = layers()
    with pytest.raises(KeyError), few_rows(model, 4):
        raise KeyError("sampling broke")
    assert not any("forward" in vars(module) for module in model.modules())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(256, 512), nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x), self.q_proj(x + 1.0), self.v_proj(x)], -1)


def test_layers_of_the_same_rows_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    block, inputs = Block(), torch.randn(2, 3, 256)
    packed: list[int] = []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    with torch.no_grad():
        expected = block(inputs)
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.ops.mkldnn, "_reorder_linear_weight", lambda w, r: (packed.append(len(w)), reorder(w, r))[1]
            )
            with few_rows(block, 6):
                for _ in range(2):  # also where the rows of the step before are other ones
                    torch.testing.assert_close(block(inputs), expected, atol=1e-5, rtol=1e-5)
    assert packed == [1024]
