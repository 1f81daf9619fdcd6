"""A rank that holds no memory: tensors without data, a fake process group, and a device that need not be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from megapt.mesh import ParallelMesh
from megapt.model import attention as model_attention
from megapt.model.positions import rotary_table
from megapt.parallel import tensor as parallel_tensor
from megapt.plan.live import LiveBytes
from megapt_kernels.attention_dispatch import AttentionSpec
from megapt_kernels.registry import operation

_META = torch.device("meta")


class FakeLive(LiveBytes):
    """Live bytes of tensors without data (on torch's meta device).

    A program that asks for a number of theirs is given 0, or false, and finds tensors equal. Collectives and transfers
    are over as soon as they are called.

    running: how many operations are being carried out, one within another. empty: whether tensors made now are meant
    to have no data, rather than made so here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running = 0
        self.empty = False
        self._empty: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.running += 1
        try:
            if function.namespace == "c10d":
                self._note(function._schema, args)
                return _over(function._schema, args)
            if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
                return False if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0
            if function is torch.ops.aten.equal.default and args[0].is_meta:
                return True
            return super().__torch_dispatch__(function, types, args, kwargs)
        finally:
            self.running -= 1

    def counts(self, storage: torch.UntypedStorage) -> bool:
        if self.empty:
            self._empty.add(storage._cdata)
        return storage._cdata not in self._empty

    def _freed(self, key: int, reference: object) -> None:
        self._empty.discard(key)
        super()._freed(key, reference)


def _over(schema: Any, args: Sequence[Any]) -> Any:
    """What a collective gives that is over. There are none for tensors without data, so a barrier takes its place."""
    group = next(value for value, given in zip(args, schema.arguments, strict=False) if given.name == "process_group")
    work = torch.ops.c10d.barrier(torch.empty(0), group, [], False, -1)
    return work if len(schema.returns) == 1 else (args[0], work)


@contextmanager
def fake_rank(rank: int, world: int, device: torch.device, deepspeed: bool = False) -> Iterator[FakeLive]:
    """Within it this process is rank `rank` of `world`, its new tensors have no data, and their live bytes are counted.

    To the program they lie on `device`, so that it takes that device's path; kernels that only GPUs have are stood in
    for by what they allocate. No GPU is needed. deepspeed: whether the rank uses it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    live = FakeLive()
    create = ParallelMesh.create

    def create_mesh(*sizes: Any) -> ParallelMesh:
        live.running += 1  # a mesh reads the numbers of a tensor of ranks
        try:
            return create(*sizes)
        finally:
            live.running -= 1

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with ExitStack() as stack:
            stack.callback(rotary_table.cache_clear)  # what it holds must not outlive this rank
            rotary_table.cache_clear()
            stack.enter_context(_replaced(ParallelMesh, "create", create_mesh))
            # Drawing initial weights changes nothing that is measured here.
            stack.enter_context(_replaced(parallel_tensor, "initialise_", _nothing))
            stack.enter_context(_replaced(dist, "all_gather_object", _gather_object))
            if deepspeed:
                from deepspeed.runtime.zero import partitioned_param_coordinator

                # Stage 3 compares numbers over ranks.
                replaced = _replaced(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", _nothing)
                stack.enter_context(replaced)
            if device.type == "cuda":
                stack.enter_context(_replaced(model_attention, "kernel_attention", _attention))
            stack.enter_context(_Program(live, device))
            stack.enter_context(live)
            yield live
    finally:
        dist.destroy_process_group()


def _nothing(*_: Any) -> None:
    pass


def _gather_object(out: list[Any], given: Any, group: Any = None) -> None:
    out[:] = [given] * len(out)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Storage:
    """A storage without data, with an address that tells it from others."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage

    def data_ptr(self) -> int:
        return self._storage._cdata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


_untyped_storage: Callable[[Tensor], Any] = Tensor.untyped_storage
_device_of = Tensor.device.__get__  # type: ignore[attr-defined]


class _Program(TorchFunctionMode):
    """Between the program and torch: devices, addresses, and kernels that only GPUs have."""

    def __init__(self, live: FakeLive, device: torch.device) -> None:
        super().__init__()
        self.live, self.gpu = live, device.type != "cpu"
        self.device = torch.device(device.type, device.index or 0) if self.gpu else device
        self.makers = _device_constructors()

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.live.running:
            return function(*args, **kwargs)
        if function is torch.autograd.backward:
            # From the ends of graphs, which torch does not send here, so that the backward runs under this mode too.
            ends = [get_gradient_edge(one) if isinstance(one, Tensor) else one for one in args[0]]
            with self:
                return function(ends, **kwargs)
        if function == _device_of:
            return self.device if args[0].is_meta else function(*args)
        if function is _untyped_storage:
            return _Storage(function(*args))
        if function is Tensor.data_ptr:
            (tensor,) = args
            return (_untyped_storage(tensor)._cdata << 6) + tensor.storage_offset() * tensor.itemsize
        if self.gpu and function in _GPU_KERNELS:
            return _GPU_KERNELS[function](*args, **kwargs)
        if "out_dtype" in kwargs:  # of torch.mm and torch.bmm, which only GPUs have
            return args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1], dtype=kwargs["out_dtype"])
        if function is Tensor.cpu:
            return args[0]
        # Where a device may stand as text, it stands first.
        texts = str if function is Tensor.to else ()
        args = [_META if isinstance(one, torch.device) or isinstance(one, texts) else one for one in args]
        asked = kwargs.get("device")
        if function in self.makers or asked is not None:
            kwargs = {**kwargs, "device": _META}
        self.live.empty = asked is not None and torch.device(asked).type == "meta"
        try:
            return function(*args, **kwargs)
        finally:
            self.live.empty = False


class _RMSNorm(Function):
    """What torch's fused kernel for GPUs keeps and makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.new_empty(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float | None = None) -> Tensor:
    made: Tensor = _RMSNorm.apply(x, weight)
    return made


class _FlashAttention(Function):
    """What the flash kernel for GPUs (arXiv 2307.08691) keeps and makes: its backward sums the queries' gradient in
    fp32, and keys' and values' for every query head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, _, _ = ctx.saved_tensors
        made = tuple(torch.empty_like(t) for t in (q, k, v))
        scratch = [torch.empty_like(q, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)]
        if q.shape[1] != k.shape[1]:
            scratch += [torch.empty_like(q), torch.empty_like(q)]
        return made


def _attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, impl: str = "auto") -> Tensor:
    """What a flash kernel takes, or the reference where there may be none."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    windowed = spec.window is not None and spec.window < q.shape[1]
    if q.dtype == torch.float64 or spec.softcap is not None or (windowed and not half):
        (reference,) = (one for one in operation("attention").implementations if one.kind == "reference")
        return reference.run(q, k, v, spec)
    made: Tensor = _FlashAttention.apply(*(t.transpose(1, 2) for t in (q, k, v)))
    return made.transpose(1, 2)


_GPU_KERNELS: dict[Any, Callable[..., Any]] = {F.rms_norm: _rms_norm}
