"""Float32 products by oneDNN: only where they are float32, only for wide models, and never for merges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from merge_search import cpu_matmul as products
from merge_search.cpu_matmul import exact, fast_products, short_attention

CPU = torch.device("cpu")
WIDE = {"weight": torch.empty(512, 256), "bias": torch.empty(512)}


@pytest.fixture
def on_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor on which oneDNN pays."""
    monkeypatch.setattr(products, "exact", lambda: True)


@pytest.mark.usefixtures("on_onednn")
def test_the_setting_is_put_back_even_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    seen = []

    def fail() -> None:
        with fast_products(WIDE):
            seen.append(torch.get_float32_matmul_precision())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == ["medium"]
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.usefixtures("on_onednn")
@pytest.mark.parametrize(
    "weights",
    [
        {"narrow": torch.empty(4096, 128)},
        {"half": torch.empty(512, 512, dtype=torch.bfloat16)},
        {"elsewhere": torch.empty(512, 512, device="meta")},
        {"few": torch.empty(256, 256), "vectors": torch.empty(70_000)},
        {},
    ],
    ids=lambda w: ", ".join(w) or "none",
)
def test_models_that_would_not_gain_are_left_alone(weights: dict[str, torch.Tensor]) -> None:
    before = torch.get_float32_matmul_precision()
    with fast_products(weights):
        assert torch.get_float32_matmul_precision() == before


def test_a_processor_that_would_round_to_bfloat16_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "exact", lambda: False)
    before = torch.get_float32_matmul_precision()
    with fast_products(WIDE):
        assert torch.get_float32_matmul_precision() == before


def test_whether_it_is_exact_does_not_depend_on_the_setting_that_it_finds() -> None:
    before = torch.get_float32_matmul_precision()
    found = set()
    for setting in ("highest", "medium"):
        exact.cache_clear()
        with products._precision(setting):
            found.add(exact())
    assert len(found) == 1
    assert torch.get_float32_matmul_precision() == before


def test_answers_and_gradients_inside_are_those_of_float64() -> None:
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)), torch.randn(48, 256)
    exactly = [p.double() for p in layer.state_dict().values()]
    with fast_products(dict(layer.named_parameters())):
        y = layer(x)
        torch.autograd.backward(y.square().mean())
    double = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).double()
    double.load_state_dict(dict(zip(double.state_dict(), exactly, strict=True)))
    z = double(x.double())
    torch.autograd.backward(z.square().mean())
    torch.testing.assert_close(y.double(), z, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(layer.parameters(), double.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("on_onednn")
def test_short_attention_is_plain_products_inside_alone() -> None:
    def kinds(length: int) -> tuple[bool, bool]:
        with short_attention(length, CPU):
            return torch._C._get_flash_sdp_enabled(), torch._C._get_math_sdp_enabled()

    assert kinds(64) == (True, True)
    with fast_products(WIDE):
        assert kinds(64) == (False, True)
        assert kinds(1024) == (True, True)


@pytest.mark.usefixtures("on_onednn")
def test_precisions_that_were_set_backend_by_backend_are_kept() -> None:
    setting = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # torch refuses to name one precision from here on
    try:
        with fast_products(WIDE), short_attention(8, CPU):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
            assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
            assert torch._C._get_flash_sdp_enabled()
    finally:
        torch.backends.cuda.matmul.fp32_precision = setting
    assert torch.get_float32_matmul_precision() == "highest"
