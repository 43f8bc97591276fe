"""Ops on Triton's kernels as on a GPU, without one: ``python tests/triton_launch.py CAPABILITY [STEP]``, JSON
lines; of each op's calls every STEP-th.

Everything up to the launch is real: which form and tile are chosen, what Triton makes of the arguments,
compilation, the GPU's limits, Triton's launcher in C. The driver that it calls at the end is
``libcuda_stand_in.c``, which notes what it is given. Every call is made twice more, the last of which may
be a repetition of what the first did (``lissom._replay``). A program of its own: Triton decides at import
whether its functions are compiled or interpreted.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton_compile import resources

from lissom import _native, _replay, ops, registry

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""That a block can have."""
MULTIPROCESSORS = 132

launches: list[dict[str, Any]] = []
inputs: dict[int, int] = {}
"""Of the op under way: which of its tensors is at an address."""


def shown(address: int) -> str:
    """Which tensor of the op that is, or where beside them."""
    return f"tensor {inputs[address]}" if address in inputs else f"workspace, {address % 16} past 16 bytes"


FOLDER = Path(__file__).resolve().parents[1] / "build" / "libcuda-stand-in"


def under_a_driver() -> None:
    """Begin this program again where the stand-in is the driver that libraries find, unless it has been."""
    if os.environ.get("LISSOM_STAND_IN") == str(FOLDER):
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = Path(__file__).with_name("libcuda_stand_in.c").read_text()
    needed = {"cuGetErrorString"}
    for path in Path(nvidia.__file__).parent.glob("driver.*"):
        needed |= set(re.findall(r"\b(cu[A-Z]\w*)\(", path.read_text()))
    missing = sorted(name for name in needed if f" {name}(" not in text)
    with tempfile.TemporaryDirectory(dir=FOLDER) as own:
        source, library = Path(own, "driver.c"), Path(own, "libcuda.so.1")
        source.write_text(text + "".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
        command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        os.replace(library, FOLDER / library.name)
        Path(own, "libcuda.so").symlink_to(library.name)  # by which Triton 3.4 links
        os.replace(Path(own, "libcuda.so"), FOLDER / "libcuda.so")
    found = {
        "LISSOM_STAND_IN": str(FOLDER),
        "TRITON_LIBCUDA_PATH": str(FOLDER),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("LD_LIBRARY_PATH")])),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or str(FOLDER / "cache"),
    }
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **found})


@cache
def driver_library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


WIDTHS = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "i32": 4, "fp32": 4, "i64": 8}
"""Bytes of a parameter that is no pointer."""


class Launcher:
    """Triton's own, which calls the stand-in of the driver; what that was given is told."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.launch = nvidia.CudaLauncher(source, metadata)
        self.told = {
            "kernel": source.fn.__name__,
            "constants": str(source.constants),
            "warps": metadata.num_warps,
            "shared": metadata.shared,
        }
        self.kinds = []
        for kind in source.signature.values():
            if kind.startswith("tensordesc"):  # of matrices: a map, sizes and strides
                self.kinds += ["*", "i32", "i32", "i64", "i64"]
            elif kind != "constexpr":
                self.kinds.append(kind)

    def __call__(self, *arguments: Any) -> None:
        library = driver_library()
        count, launched = (ctypes.c_int.in_dll(library, f"stand_in_{name}") for name in ("count", "launches"))
        count.value, before = len(self.kinds), launched.value
        self.launch(*arguments)
        assert launched.value == before + 1
        values = (ctypes.c_uint64 * len(self.kinds)).in_dll(library, "stand_in_parameters")
        given = [
            f"{kind} to {shown(value)}" if kind[0] == "*" else value & ((1 << 8 * WIDTHS[kind]) - 1)
            for kind, value in zip(self.kinds, values, strict=True)
        ]
        grid = list((ctypes.c_uint * 3).in_dll(library, "stand_in_grid"))
        launches.append({**self.told, "grid": grid, "arguments": given})


class Utilities:
    """Of the driver; what is not here is Triton's own."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.own = nvidia.CudaUtils()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.capability], "multiprocessor_count": MULTIPROCESSORS}

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads; a kernel that spills is refused."""
        used = resources(code)
        if used["local_bytes"]:
            raise RuntimeError(f"{name} spills: {used['local_bytes']} bytes of local memory a thread")
        return 1, 1, used["registers"], 0, 1024


class Driver:
    launcher_cls: Any = Launcher

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = Utilities(capability)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def map_python_to_cpp_type(self, kind: str) -> str:
        return str(nvidia.ty_to_cpp(kind))


def stand_in(capability: int) -> None:
    """CPU tensors are served by Triton's backend, which takes them for those of such a GPU."""
    triton.runtime.driver.set_active(Driver(capability))
    for name in ("int8_embedding", "int4_embedding"):  # what the CPU looks at first, no GPU waits for
        importlib.import_module(f"lissom.ops.{name}").check_in_range = lambda *_: None  # type: ignore[attr-defined]
    for name in ("int8_linear", "int4_linear", "block_sparse_linear", "distill_loss"):
        module = importlib.import_module(f"lissom.kernels.{name}")
        module.architecture = lambda device: capability  # type: ignore[attr-defined]
        counter = "_processors" if name == "distill_loss" else "_multiprocessors"
        assert hasattr(module, counter)
        setattr(module, counter, lambda device: MULTIPROCESSORS)
    for (op, device), backends in list(registry._candidates.items()):
        if device == "cuda":
            usable = [registry.Backend(b.name, b.run) for b in backends if b.name == "triton"]
            registry.register(op, "cpu", *usable)


# ------------------------------------------------------------------------------------------- what is called

HALF, SINGLE, FP16 = torch.bfloat16, torch.float32, torch.float16
Call = tuple[str, Callable[[], Any]]


def int8_linear() -> Iterator[Call]:
    def call(m: int, n: int, k: int, dtype: torch.dtype = HALF, **options: Any) -> Call:
        q = torch.ones(n, k, dtype=torch.int8)
        bias = torch.zeros(n, dtype=dtype)
        x = torch.zeros(m, k, dtype=dtype)
        return f"{m}x{n}x{k} {dtype} {options}", lambda: ops.int8_linear(
            x, q, torch.ones(n), bias, backend="triton", **options
        )

    for m in (1, 2, 7, 64, 300, 4096):
        yield call(m, 1024, 2048, rotated=True, act_fn="gelu")
    yield call(16, 1024, 2048, input_scale=torch.ones(()))
    for m in (1, 16, 300):
        yield call(m, 1024, 2048, weight_only=True)
    for m in (1, 9, 200):
        yield call(m, 333, 777, SINGLE)
    yield call(5, 1, 1)
    yield call(5, 333, 777, SINGLE, weight_only=True)


def int8_embedding() -> Iterator[Call]:
    for dtype in (HALF, SINGLE):
        table = torch.zeros(100, 384, dtype=torch.int8)
        yield (
            str(dtype),
            lambda t=table, d=dtype: ops.int8_embedding(  # type: ignore[misc]
                torch.arange(8), t, torch.ones(100), dtype=d, backend="triton"
            ),
        )


def int4_linear() -> Iterator[Call]:
    def call(
        m: int, n: int, k: int, dtype: torch.dtype = HALF, group_size: int = 128, zero: bool = True, **o: Any
    ) -> Call:
        groups = 1 if group_size < 0 else -(-k // group_size)
        if zero:
            o["zero_point"] = torch.zeros(n, groups, dtype=torch.uint8)
        codes = torch.zeros(n, (k + 1) // 2, dtype=torch.uint8)
        x = torch.zeros(m, k, dtype=dtype)
        shown = {name: tuple(v.shape) if isinstance(v, Tensor) else v for name, v in o.items()}
        return f"{m}x{n}x{k} {dtype} group_size={group_size} {shown}", lambda: ops.int4_linear(
            x, codes, torch.ones(n, groups), group_size=group_size, backend="triton", **o
        )

    for m in (1, 16, 64, 300):
        yield call(m, 1024, 2048, weight_only=True, act_fn="silu")
        yield call(m, 1024, 2048, rotated=True)
    yield call(4, 1024, 2048, FP16, zero=False, weight_only=True)
    yield call(4, 256, 1000, FP16, 32, zero=False, weight_only=True, codebook=torch.zeros(256, 16))
    yield call(40, 256, 1000, SINGLE, 64, zero=False, codebook=torch.zeros(16))
    yield call(40, 256, 1000, SINGLE, 64, weight_only=True)
    yield call(3, 33, 777, SINGLE, 32, group_index=torch.arange(777, dtype=torch.int32) % 25)
    yield call(3, 33, 777, HALF, -1, weight_only=True)


def int4_embedding() -> Iterator[Call]:
    codes, scale = torch.zeros(100, 192, dtype=torch.uint8), torch.ones(100, 3)
    for dtype in (HALF, SINGLE):
        yield (
            str(dtype),
            lambda d=dtype: ops.int4_embedding(  # type: ignore[misc]
                torch.arange(8), codes, scale, embedding_dim=384, dtype=d, backend="triton"
            ),
        )


def block_sparse_linear() -> Iterator[Call]:
    sparse = importlib.import_module("lissom.ops.block_sparse_linear")

    def call(
        m: int, n: int, k: int, height: int, width: int, dtype: torch.dtype, values: torch.dtype
    ) -> Iterator[Call]:
        rows, columns = -(-n // height), -(-k // width)
        stored = torch.rand(rows, columns) < 0.3
        stored[0, 0] = True
        crow = torch.cat([torch.zeros(1, dtype=torch.int64), stored.sum(1).cumsum(0)]).int()
        col = stored.nonzero()[:, 1].int()
        given = torch.zeros(len(col), height, width, dtype=values)
        scale = torch.ones(n) if values is torch.int8 else None
        x, grad = torch.zeros(m, k, dtype=dtype), torch.zeros(m, n, dtype=dtype)
        text = f"{m}x{n}x{k} {height}x{width} {dtype} {values}"
        yield (
            text,
            lambda: ops.block_sparse_linear(
                x, given, crow, col, n, k, weight_scale=scale, act_fn="relu", validated=True, backend="triton"
            ),
        )
        if scale is None:
            yield (
                f"{text}, input gradient",
                lambda: sparse.block_sparse_grad_input(grad, given, crow, col, n, k, backend="triton"),
            )
            yield (
                f"{text}, value gradient",
                lambda: sparse.block_sparse_grad_values(grad, x, crow, col, height, width, backend="triton"),
            )

    for size, m in itertools.product((16, 64, 128), (1, 300)):
        yield from call(m, 512, 1024, size, size, HALF, HALF)
        yield from call(m, 512, 1024, size, size, HALF, torch.int8)
    yield from call(64, 512, 1024, 32, 32, SINGLE, SINGLE)
    yield from call(300, 512, 1024, 64, 64, HALF, SINGLE)
    yield from call(300, 512, 1024, 64, 64, FP16, FP16)
    yield from call(64, 512, 1024, 16, 16, HALF, FP16)
    yield from call(33, 500, 777, 8, 1, SINGLE, SINGLE)
    yield from call(33, 500, 777, 3, 5, FP16, torch.int8)


def distill_loss() -> Iterator[Call]:
    def call(rows: int, vocab: int, dtype: torch.dtype, teacher: torch.dtype, **options: Any) -> Call:
        def run() -> None:
            student = torch.zeros(rows, vocab, dtype=dtype, requires_grad=True)
            labels = torch.zeros(rows, dtype=torch.int64)
            ops.distill_loss(
                student,
                torch.zeros(rows, vocab, dtype=teacher),
                labels,
                ce_weight=0.5,
                backend="triton",
                **options,
            ).backward()

        return f"{rows}x{vocab} {dtype} {teacher} {options}", run

    for vocab in (10, 1000, 32000, 32001, 256000):
        yield call(16, vocab, HALF, HALF, temperature=2.0)
    yield call(16, 1000, SINGLE, SINGLE, divergence="js", softcap=30.0, label_smoothing=0.1)
    yield call(2, 32000, HALF, SINGLE, divergence="reverse", entropy_weight=0.1)
    yield call(2, 32000, FP16, FP16, divergence="js")


def linear_distill_loss() -> Iterator[Call]:
    hidden = torch.zeros(70, 64, dtype=HALF, requires_grad=True)
    weight = torch.zeros(1000, 64, dtype=HALF, requires_grad=True)
    topk = torch.zeros(70, 8, dtype=HALF), torch.arange(8).expand(70, 8)
    yield (
        "dense teacher",
        lambda: ops.linear_distill_loss(
            hidden,
            weight,
            teacher_hidden=hidden.detach(),
            teacher_weight=weight.detach(),
            backend="triton",
        ).backward(),
    )
    yield (
        "top-k teacher",
        lambda: ops.linear_distill_loss(hidden, weight, teacher_topk=topk, backend="triton").backward(),
    )
    scale_rows = importlib.import_module("lissom.kernels.distill_loss").scale_rows
    yield "gradient of a loss that is weighted", lambda: scale_rows(torch.ones(70, 1000), torch.ones(()))


OPS = (
    int8_linear,
    int8_embedding,
    int4_linear,
    int4_embedding,
    block_sparse_linear,
    distill_loss,
    linear_distill_loss,
)


def watch_calls() -> None:
    """Note the tensors of every op that may be repeated."""
    called = _replay.Calls.__call__

    def noting(self: _replay.Calls, run: Callable[..., Tensor], *arguments: Any) -> Tensor | None:
        inputs.clear()
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        inputs.update({tensor.data_ptr(): index for index, tensor in enumerate(tensors)})
        return called(self, run, *arguments)

    _replay.Calls.__call__ = noting  # type: ignore[method-assign]
    _native.load().call_key_on_cpu(True)


def main(capability: int, step: int = 1) -> None:
    stand_in(capability)
    watch_calls()
    for op in OPS:
        for name, run in itertools.islice(op(), 0, None, step):
            _replay.forget()
            inputs.clear()
            turns = []
            try:
                for _ in range(3):
                    launches.clear()
                    run()
                    turns.append(list(launches))
                fault = ""
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"[:2000]
            replayed = any(replay for calls in _replay._all for replay in calls._known.values())
            row = {"op": op.__name__, "call": name, "fault": fault, "turns": turns, "replayed": replayed}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    under_a_driver()
    main(*map(int, sys.argv[1:]))
