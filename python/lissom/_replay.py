"""Calls on a GPU that are like an earlier one: its launches are repeated, with the tensors of the new call.

Between a call and its launches lies Python: checks, the choice of a backend, form and tile, what Triton asks
of every argument. It takes 30 to 90 µs, longer than the kernels of a few rows run, and comes out the same for
calls that differ only in the values of their tensors and in where these lie. So the second call of a kind is
recorded, and from the third on only what was recorded is done, in 9 to 18 µs (``bench/host_time.py``).

A recording is what a call allocated and launched, each pointer by the tensor that it points into. A call that
did anything else, such as an operation of torch, is not repeated: what decides is seen, not assumed. With
``LISSOM_REPLAY=0`` in the environment when lissom is imported, none is.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _native

__all__ = ["Calls", "Recording", "current_stream", "forget", "recording", "repeating"]

_MOST = 4096
"""Kinds of calls of an op that are remembered."""

_APART = 256
"""Bytes that pieces of one allocation start at multiples of, as torch's allocations do (its are 512)."""

_LEAST_ADDRESS = 1 << 32
"""Integers below are sizes, strides and codes."""

_enabled = os.environ.get("LISSOM_REPLAY") != "0"
"""What :func:`repeating` changes."""

_C: Any = torch._C
_current = threading.local()
_all: weakref.WeakSet[Calls] = weakref.WeakSet()
_all_lock = threading.Lock()


class Unfit(Exception):
    """The recorded call cannot be repeated."""


def current_stream(device: int) -> int:
    """``torch.cuda.current_stream(device).cuda_stream``, which takes a microsecond more."""
    stream: int = _C._cuda_getCurrentRawStream(device)
    return stream


def recording() -> Recording | None:
    """The recording of the call under way on this thread."""
    found: Recording | None = getattr(_current, "recording", None)
    return found


class Calls:
    """What is remembered of the calls of one op, or of those with the same constant tensors.

    ``calls(run, *arguments)`` is ``run(*arguments)``, or None unless the arguments are tensors of one GPU and
    of torch's own class, None, bool, int, str and dtypes. The first is a tensor. ``run`` may depend on
    nothing else but what :func:`forget` is called for. Of ``most`` kinds and more, all are forgotten.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._known: dict[bytes, _Replay | None] = {}
        self._seen: set[bytes] = set()
        with _all_lock:
            _all.add(self)

    def __call__(self, run: Callable[..., Tensor], *arguments: Any) -> Tensor | None:
        native = _native.extension() if _enabled else None
        if native is None or (found := native.call_key(arguments)) is None:
            return None
        key, addresses = found
        if (replay := self._known.get(key)) is not None:
            return replay(arguments[0], addresses)
        if key in self._known or recording() is not None:
            return run(*arguments)
        if key not in self._seen:  # kinds that come once, such as prompts of any length, are not recorded
            if len(self._seen) >= self._most:
                self.forget()
            self._seen.add(key)
            return run(*arguments)
        return self._record(key, run, arguments)

    def _record(self, key: bytes, run: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        first, known = arguments[0], self._known
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            return run(*arguments)
        seen = Recording([a for a in arguments if isinstance(a, Tensor)])
        _current.recording = seen
        try:
            with _Watch(seen):
                result = run(*arguments)
        finally:
            _current.recording = None
        if not seen.again:
            try:
                known[key] = seen.replay(result)
            except Unfit:
                known[key] = None
        return result

    def forget(self) -> None:
        self._known, self._seen = {}, set()  # new ones: a recording under way on another thread keeps the old


def forget() -> None:
    """Forget all calls: what chooses among kernels has changed."""
    with _all_lock:
        every = list(_all)
    for calls in every:
        calls.forget()


@contextlib.contextmanager
def repeating(enabled: bool) -> Iterator[None]:
    """Whether calls in the block are repeated, on all threads."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


class _Watch(TorchDispatchMode):
    """Sees what torch does: the recorded call may allocate, and view what it has."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Entering any other mode is known to the whole process, in whose threads torch.compile then lets
        functions run as they are."""
        return True

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.recording.looking:
            return result
        if func is torch.ops.aten.empty.memory_format:
            self.recording.allocated.append(result)
        elif func._schema.is_mutable or not _is_view(result, args):
            self.recording.unfit = str(func)
        return result


def _is_view(result: Any, args: Any) -> bool:
    """Whether an operation did no more than to look at its first argument in another way."""
    if not (isinstance(result, Tensor) and args and isinstance(args[0], Tensor)):
        return False
    return result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()


class Recording:
    """What a call does, as it does it.

    Attributes:
        unfit: why it cannot be repeated, or ``""``.
        again: record the next such call instead.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.allocated: list[Tensor] = []
        self.unfit = ""
        self.again = False
        self.looking = True
        self._asked: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []
        self._kept: list[Tensor] = []
        self._launches: list[tuple[Callable[..., object], tuple[Any, ...], bool]] = []

    def launched(self, function: Callable[..., object], arguments: Sequence[Any], by_name: bool) -> None:
        """``function(*arguments, stream)`` was called; ``by_name``: with ``stream=``."""
        self._launches.append((function, tuple(arguments), by_name))

    def asked(self, ask: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        """``ask(like)``, which will be asked anew in every repetition, whatever it does."""
        self.looking = False
        try:
            tensor = ask(like)
        finally:
            self.looking = True
        self._asked.append((tensor, ask))
        return tensor

    def keep(self, tensors: Sequence[Tensor], settled: bool) -> None:
        """The call was given ``tensors`` that every such call will be given; ``settled``: without waiting."""
        self._kept += tensors
        self.again = self.again or not settled

    def replay(self, result: Tensor) -> _Replay:
        """How to repeat the call.

        Raises:
            Unfit: it cannot be repeated.
        """
        if self.unfit or not self._launches:
            raise Unfit(self.unfit or "nothing was launched")
        outputs = [t for t in self.allocated if t.data_ptr() == result.data_ptr()]
        if len(outputs) != 1 or not result.is_contiguous() or result.numel() != outputs[0].numel():
            raise Unfit("what is returned is not one allocation")
        # In the order in which a repetition has their addresses.
        places = [(index, 0, tensor) for index, tensor in enumerate((*self.inputs, outputs[0]))]
        workspace, index = 0, len(places)
        for tensor in self.allocated:
            if tensor is not outputs[0] and tensor.numel():
                places.append((index, workspace, tensor))
                workspace += -(-tensor.nbytes // _APART) * _APART
        places += [(index + 1 + i, 0, tensor) for i, (tensor, _) in enumerate(self._asked)]
        kept = list({tensor.data_ptr(): tensor for tensor in self._kept if tensor.numel()}.values())
        places += [(_CONSTANT, 0, tensor) for tensor in kept]
        if any(tensor.data_ptr() < _LEAST_ADDRESS for _, _, tensor in places):
            raise Unfit("addresses cannot be told from sizes")
        launches = [_Launch(*one, places) for one in self._launches]
        return _Replay(result, workspace, [ask for _, ask in self._asked], launches, kept)


_CONSTANT = -1

Place = tuple[int, int, Tensor]
"""Which of a repetition's addresses, or _CONSTANT, a tensor is found at, and how many bytes behind it."""


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * (1 + sum((size - 1) * step for size, step in steps))


def _find(address: int, places: Sequence[Place]) -> tuple[int, int]:
    """What ``address`` is to a repetition; it must point into one tensor alone."""
    inside = [
        (index, offset + address - tensor.data_ptr())
        for index, offset, tensor in places
        if 0 <= address - tensor.data_ptr() < _extent(tensor)
    ]
    if len(inside) != 1:
        raise Unfit(f"{address:#x} points into {len(inside)} of the call's tensors")
    return inside[0]


class _Launch:
    """A launch, of which only pointers change."""

    def __init__(
        self,
        function: Callable[..., object],
        arguments: tuple[Any, ...],
        by_name: bool,
        places: Sequence[Place],
    ) -> None:
        self.function = function
        self.by_name = by_name
        self.arguments = list(arguments)  # of which no tensor stays
        self.pointers: list[tuple[int, int, int]] = []
        self.descriptors: list[int] = []
        for position, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                address = argument.data_ptr()
            elif isinstance(getattr(argument, "base", None), Tensor):  # Triton's, for TMA
                address = argument.base.data_ptr()
            elif isinstance(argument, int) and argument >= _LEAST_ADDRESS:
                address = argument
            elif argument is None or isinstance(argument, int | float):
                continue
            else:
                raise Unfit(f"an argument is a {type(argument).__name__}")
            index, offset = _find(address, places)
            if hasattr(argument, "base"):
                self.descriptors.append(position)
                self.arguments[position] = _based(argument, address)
            else:
                self.arguments[position] = address
            if index != _CONSTANT:
                self.pointers.append((position, index, offset))

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        arguments = self.arguments.copy()
        for position, index, offset in self.pointers:
            arguments[position] = addresses[index] + offset
        for position in self.descriptors:
            if isinstance(arguments[position], int):
                arguments[position] = _based(self.arguments[position], arguments[position])
        if self.by_name:
            self.function(*arguments, stream=stream)
        else:
            self.function(*arguments, stream)


class _At:
    """What Triton asks of the tensor in a descriptor."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def _based(descriptor: Any, address: int) -> Any:
    """The same descriptor of what is at ``address``."""
    copied = copy.copy(descriptor)
    copied.base = _At(address)
    return copied


class _Replay:
    """Repeats a call."""

    def __init__(
        self,
        result: Tensor,
        workspace: int,
        ask: Sequence[Callable[[Tensor], Tensor]],
        launches: Sequence[_Launch],
        kept: Sequence[Tensor],
    ) -> None:
        self.kept = kept  # constants of the launches are their addresses
        self.shape, self.dtype, self.device = result.shape, result.dtype, result.device
        self.workspace, self.ask, self.launches = workspace, ask, launches

    def __call__(self, like: Tensor, inputs: tuple[int, ...]) -> Tensor:
        device = self.device
        if device.type != "cuda":  # in tests
            return self._launch(like, inputs, 0)
        if torch.cuda.current_device() != device.index:
            with torch.cuda.device(device.index):
                return self(like, inputs)
        return self._launch(like, inputs, current_stream(device.index))

    def _launch(self, like: Tensor, inputs: tuple[int, ...], stream: int) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        addresses = [*inputs, out.data_ptr()]
        # Tensors need names until all is launched; torch's allocator then keeps the order of the stream.
        held = []
        if self.workspace:
            held.append(torch.empty(self.workspace, dtype=torch.uint8, device=self.device))
            addresses.append(held[0].data_ptr())
        elif self.ask:
            addresses.append(0)
        for ask in self.ask:
            held.append(ask(like))
            addresses.append(held[-1].data_ptr())
        for launch in self.launches:
            launch(addresses, stream)
        return out
