"""What torch.compile is to know of functions that it meets while tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`: a traced call is made once, and its result is a constant.

    Torch's own decorator imports the whole compiler, which takes a second and imports Triton; this is what it sets.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
