"""Cases in which a library's kernel is known to give wrong numbers, or none: data, with where it was reported.

An entry holds until a version is known that was tested without the fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megapt_kernels.attention_backends.case import Case


@dataclass(frozen=True)
class KnownWrong:
    """backend: its name. when: the cases. reason: what happens. link: the report."""

    backend: str
    when: Callable[[Case], bool]
    reason: str
    link: str


def _major(case: Case) -> int:
    return case.machine.capability[0]


KNOWN_WRONG = (
    KnownWrong(
        "torch cudnn",
        # Reported without a causal mask; a causal one hides the keys in question. The kernel is the same.
        lambda c: c.grad and _major(c) == 9 and c.machine.torch >= (2, 11) and c.length % 128 == 64,
        "NaN in the gradient of q where S % 128 == 64 and a row's scores are all far below 0",
        "https://github.com/pytorch/pytorch/issues/196678",
    ),
    KnownWrong(
        "torch cudnn",
        lambda c: c.grad and c.length == 1,
        "NaN in the gradients of k and v where S is 1, or a crash while planning",
        "https://github.com/NVIDIA/cudnn-frontend/issues/1072",
    ),
    KnownWrong(
        "torch cudnn",
        lambda c: _major(c) == 10 and c.kv_heads < 8,
        "wrong results on B200 with fewer than 8 key/value heads",
        "https://github.com/pytorch/pytorch/issues/193893",
    ),
    KnownWrong(
        "torch cudnn",
        lambda c: c.grad and _major(c) == 10,
        "gradients of q and k off by up to 13 % on B200 where a row's scores are far below 0",
        "https://github.com/NVIDIA/cudnn-frontend/issues/744",
    ),
    KnownWrong(
        "flash-attn 3",
        lambda c: c.grad and c.repeatable,
        "the gradient of q is summed in any order: builds drop the option that asks for one",
        "https://github.com/Dao-AILab/flash-attention/pull/1766",
    ),
    KnownWrong(
        "flash-attn 4",
        lambda c: c.softcap,
        "soft caps were computed wrongly before March 2026",
        "https://github.com/Dao-AILab/flash-attention/pull/2402",
    ),
    KnownWrong(
        "flash-attn 4",
        lambda c: c.softcap and c.grad,
        "the backward pass of a soft cap hangs",
        "https://github.com/Dao-AILab/flash-attention/issues/2466",
    ),
    KnownWrong(
        "flash-attn 4",
        lambda c: c.grad and c.width > 128,
        "wrong gradients for heads 256 wide with more than one sequence",
        "https://github.com/NVIDIA/TransformerEngine/issues/3216",
    ),
    KnownWrong(
        "torch flex",
        lambda c: c.grad and c.softcap and (c.varied or c.count * c.length % 128 != 0),
        "NaN gradients with a soft cap where the tokens are no multiple of 128",
        "https://github.com/pytorch/pytorch/issues/153799",
    ),
)


def known_wrong(backend: str, case: Case) -> str | None:
    """Why the numbers of `backend` are not to be trusted in this case; None where nothing is known."""
    for entry in KNOWN_WRONG:
        if entry.backend == backend and entry.when(case):
            return f"{entry.reason} ({entry.link})"
    return None
