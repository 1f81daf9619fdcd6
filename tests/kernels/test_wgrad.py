"""Weight gradients added to an fp32 buffer: exact sums of 16-bit operands, nothing rounded on the way."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megapt_kernels import explain, wgrad, wgrad_accumulate_
from megapt_kernels.registry import Unsupported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["auto", "reference", "torch", "apex"]


def operands(tokens: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """main_grad, dy and x, whose products would be rounded in 16 bits."""
    generator = torch.Generator().manual_seed(tokens + n + k)
    main_grad, dy, x = (torch.randn(shape, generator=generator) for shape in ((n, k), (tokens, n), (tokens, k)))
    return main_grad.to(DEVICE), dy.to(DEVICE, dtype), x.to(DEVICE, dtype)


def skip_unless_supported(impl: str, *arguments: Tensor, fresh: bool) -> None:
    explanation = explain("wgrad_accumulate_", *arguments, fresh=fresh, impl=impl)
    if explanation.chosen is None:
        pytest.skip(dict(explanation.rejected)[impl])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fresh", [False, True])
def test_sums_are_those_of_fp32_products(impl: str, fresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wgrad, "_WIDENED", 64)  # several blocks of tokens
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens, n, k in ((1, 1, 1), (37, 5, 9), (64, 16, 8), (3, 70, 2)):
            main_grad, dy, x = operands(tokens, n, k, dtype)
            if impl in ("torch", "apex"):
                skip_unless_supported(impl, main_grad, dy, x, fresh=fresh)
            exact = dy.double().t() @ x.double() + (0 if fresh else main_grad.double())
            if fresh:
                main_grad.fill_(float("nan"))  # what was there is not read
            given = main_grad.data_ptr()
            result = wgrad_accumulate_(main_grad, dy, x, fresh=fresh, impl=impl)
            assert result is main_grad and main_grad.data_ptr() == given
            plain = dy.float().t() @ x.float()
            plain_error = (plain.double() - dy.double().t() @ x.double()).norm()
            error = (main_grad.double() - exact).norm()
            assert error <= 2 * plain_error + 4 * torch.finfo(torch.float32).eps * exact.norm(), (dtype, tokens)


def test_no_tokens_and_strided_operands() -> None:
    main_grad, dy, x = operands(6, 4, 3, torch.bfloat16)
    before = main_grad.clone()
    assert torch.equal(wgrad_accumulate_(main_grad, dy[:0], x[:0]), before)
    assert not wgrad_accumulate_(main_grad, dy[:0], x[:0], fresh=True).any()
    # Rows of a larger tensor and a transposed one, into a part of a larger buffer.
    large = torch.zeros(8, 10, device=DEVICE)
    part = large[2:6, 1:4]
    wgrad_accumulate_(part, torch.cat([dy, dy], 1)[:, 2:6], x.t().contiguous().t(), impl="reference")
    torch.testing.assert_close(part, torch.cat([dy, dy], 1)[:, 2:6].float().t() @ x.float())
    assert large.count_nonzero() == part.count_nonzero()


def test_fp64_stays_fp64_and_gradients_are_left_alone() -> None:
    main_grad, dy, x = (t.double() for t in operands(6, 4, 3, torch.float32))
    dy.requires_grad_()
    expected = main_grad + dy.detach().t() @ x
    assert not wgrad_accumulate_(main_grad, dy, x).requires_grad
    torch.testing.assert_close(main_grad, expected, rtol=1e-14, atol=1e-14)


def test_compiles_as_one_graph() -> None:
    main_grad, dy, x = operands(6, 4, 3, torch.bfloat16)
    expected = wgrad_accumulate_(main_grad.clone(), dy, x, impl="reference")
    torch.compile(lambda *a: wgrad_accumulate_(*a, impl="reference"), fullgraph=True, backend="aot_eager")(
        main_grad, dy, x
    )
    assert torch.equal(main_grad, expected)


def test_apex_is_found_by_its_module_and_called_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, ...]] = []
    module = SimpleNamespace(wgrad_gemm_accum_fp32=lambda *a: calls.append(a), __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", module)
    main_grad, dy, x = operands(6, 4, 3, torch.bfloat16)
    wgrad._apex(main_grad, dy, x, fresh=True)
    assert calls[0][0] is x and calls[0][1] is dy and calls[0][2] is main_grad and not main_grad.any()
    main_grad, dy, x = (torch.empty_like(t, device="meta") for t in (main_grad, dy, x))
    assert wgrad._apex_supports(main_grad, dy, x) is None
    for reason, arguments in (
        ("runs on CUDA devices, not on cpu", operands(6, 4, 3, torch.bfloat16) if DEVICE == "cpu" else None),
        ("dy and x must be contiguous", (main_grad, dy.t().contiguous().t(), x)),
        ("takes operands of 16 bits, not torch.float32", (main_grad, dy.float(), x.float())),
        ("main_grad must be contiguous, not strided (1, 4)", (main_grad.t().contiguous().t(), dy, x)),
    ):
        assert arguments is None or wgrad._apex_supports(*arguments) == reason


def test_torch_is_asked_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    main_grad, dy, x = (torch.empty_like(t, device="meta") for t in operands(6, 4, 3, torch.bfloat16))
    assert wgrad._torch_supports(main_grad, dy, x) is None
    assert wgrad_accumulate_(main_grad, dy, x, impl="torch").shape == (4, 3)
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    assert "need torch 2.11, this is 2.10.1+cu128" in str(wgrad._torch_supports(main_grad, dy, x))


def test_wrong_arguments_are_named() -> None:
    main_grad, dy, x = (t.cpu() for t in operands(6, 4, 3, torch.bfloat16))
    for bad, words in (
        ((main_grad, dy[0], x), "dy has two dimensions"),
        ((main_grad, dy.to("meta"), x), "dy is on meta, main_grad on cpu"),
        ((main_grad, dy.int(), x), "dy is bf16, fp16, fp32 or fp64, not torch.int32"),
        ((main_grad, dy, x.half()), "x has the dtype of dy, torch.bfloat16, not torch.float16"),
        ((main_grad.bfloat16(), dy, x), "main_grad is torch.float32 for operands in torch.bfloat16"),
        ((main_grad, dy, x[:5]), "x has as many tokens as dy, 6, not 5"),
        ((main_grad.t(), dy, x), r"main_grad is \(4, 3\) for this dy and x, not \(3, 4\)"),
    ):
        with pytest.raises(Unsupported, match=f"wgrad_accumulate_: {words}"):
            wgrad_accumulate_(*bad)
