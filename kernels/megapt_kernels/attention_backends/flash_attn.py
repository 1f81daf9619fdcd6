"""The flash-attn libraries: FlashAttention-2 (arXiv 2307.08691), -3 (arXiv 2407.08608) and -4, each with its own ways.

Windows count the tokens before a query: (-1, -1) for all in versions 2 and 3, (None, None) in version 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megapt_kernels.attention_backends.case import Case, Library, flash_attn_3_module, machine
from megapt_kernels.attention_backends.documents import cu_seqlens, documents_of
from megapt_kernels.attention_backends.known_wrong import known_wrong
from megapt_kernels.attention_backends.torch_sdpa import (
    from_ampere,
    half_only,
    narrow_shared_memory,
    shown,
    width_limits,
)

if TYPE_CHECKING:
    from megapt_kernels.attention_dispatch import AttentionSpec


def supports_2(case: Case) -> str | None:
    library = case.machine.flash_attn_2
    reason = _supports(case, library, 256) or from_ampere(case)
    if reason is not None:
        return reason
    # Windows from 2.3, deterministic gradients from 2.4.1, soft caps from 2.6.
    if library.version < (2, 6):
        return f"is wanted from 2.6 on; this is {'.'.join(map(str, library.version))}"
    return narrow_shared_memory(case) or known_wrong("flash-attn 2", case)


def supports_3(case: Case) -> str | None:
    if case.machine.device == "cuda" and case.machine.capability[0] != 9:
        return f"is written for Hopper, compute capability 9.0; this is {shown(case.machine.capability)}"
    return _supports(case, case.machine.flash_attn_3, 256) or known_wrong("flash-attn 3", case)


def supports_4(case: Case) -> str | None:
    found, library = case.machine.capability, case.machine.flash_attn_4
    if case.machine.device == "cuda" and found[0] not in (9, 10):
        return f"is written for compute capabilities 9.0 and 10.0; this is {shown(found)}"
    reason = _supports(case, library, 128) or known_wrong("flash-attn 4", case)
    if reason is not None:
        return reason
    if case.grad and case.windowed and "backward window" not in library.options:
        return "this release forgets the window in its backward pass"
    if case.grad and case.repeatable and (found[0] != 10 or "deterministic" not in library.options):
        return "its gradients are deterministic on compute capability 10.0 alone, from the release that has the option"
    return None


def _supports(case: Case, library: Library, most: int) -> str | None:
    if case.machine.device != "cuda":
        return f"runs on CUDA devices, not on {case.machine.device}"
    return library.problem or half_only(case) or width_limits(case, most)


# Imports are written out, since torch.compile follows import statements alone.
def run_2(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    from flash_attn.flash_attn_interface import (  # type: ignore[import-not-found]
        flash_attn_func,
        flash_attn_varlen_func,
    )

    options = _options(spec, -1) | {"deterministic": spec.deterministic}
    return _run(flash_attn_func, flash_attn_varlen_func, q, k, v, spec, options, True)


def run_3(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    if flash_attn_3_module() == "flash_attn_interface":
        from flash_attn_interface import (  # type: ignore[import-not-found]
            flash_attn_func,
            flash_attn_varlen_func,
        )
    else:
        from flash_attn_3.flash_attn_interface import (  # type: ignore[import-not-found]
            flash_attn_func,
            flash_attn_varlen_func,
        )

    return _run(flash_attn_func, flash_attn_varlen_func, q, k, v, spec, _options(spec, -1), True)


def run_4(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found]

    known, options = machine(q.device).flash_attn_4.options, _options(spec, None)
    if spec.deterministic and "deterministic" in known:
        options["deterministic"] = True
    return _run(flash_attn_func, flash_attn_varlen_func, q, k, v, spec, options, "max_seqlen_q" in known)


def _options(spec: AttentionSpec, everything: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {"softmax_scale": spec.scale, "causal": spec.causal}
    if spec.window is not None:
        options["window_size"] = (spec.window - 1, 0)
    else:
        options["window_size"] = (everything, everything)
    if spec.softcap is not None:
        options["softcap"] = spec.softcap
    return options


def _run(
    rows: Callable[..., Any],
    documents: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    options: dict[str, Any],
    longest: bool,
) -> Tensor:
    """By the library's function for rows or by that for documents; longest: the latter wants to know how long the
    longest one is."""
    lengths = documents_of(spec.lengths, q.shape[0], q.shape[1])
    if len(set(lengths)) == 1:
        y = rows(*(t.flatten(0, 1).unflatten(0, (len(lengths), lengths[0])) for t in (q, k, v)), **options)
    else:
        bounds = cu_seqlens(lengths, q.device)
        options |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
        if longest:
            options |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
        y = documents(*(t.flatten(0, 1) for t in (q, k, v)), **options)
    # Some releases return the logs of the softmax's denominators beside.
    result: Tensor = y[0] if isinstance(y, tuple) else y
    return result.reshape(q.shape)
