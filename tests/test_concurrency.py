"""Python threads, ``torch.set_num_threads`` and ``fork``. Fresh processes: a hang is a failure."""

from __future__ import annotations

import threading

import pytest
import torch

from lissom.nn import Int8Embedding, Int8Linear
from lissom.ops import distill_loss
from lissom.reference.distill_loss import DIVERGENCES
from lissom.testing import (
    BLOCK_SPARSE_DTYPES,
    MODES,
    BlockSparseCase,
    DistillCase,
    LinearCase,
    assert_same_bits,
    block_sparse_inputs,
    distill_inputs,
    linear_inputs,
)

OP = torch.ops.lissom.int8_linear.default


def in_threads(count: int, work) -> None:  # type: ignore[no-untyped-def]
    """Run ``work(i)`` in ``count`` threads that start together; the first exception is raised here."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def body(i: int) -> None:
        try:
            barrier.wait(timeout=60)
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("mode", MODES)
def test_many_threads_call_one_op(native: str, mode: str) -> None:
    """Different shapes at once: per-thread scratch memory, shared packed weights."""
    cases = [
        LinearCase(m, k, n, "") for m, k, n in ((1, 64, 500), (40, 300, 130), (7, 17, 33), (200, 128, 64))
    ]
    made = [linear_inputs(case, torch.float32, mode, "gelu", seed=i) for i, case in enumerate(cases * 2)]
    expected = [OP(*inputs.args) for inputs in made]

    def work(i: int) -> None:
        for _ in range(25):
            assert_same_bits(OP(*made[i].args), expected[i])

    in_threads(len(made), work)


@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
def test_many_threads_call_block_sparse_linear(native: str, value_dtype: torch.dtype) -> None:
    """Forward and both gradients, different shapes at once: per-thread scratch memory."""
    ops = torch.ops.lissom
    made = [
        block_sparse_inputs(BlockSparseCase(m, k, n, 0.3, ""), block_shape, value_dtype, seed=i)
        for i, (m, k, n, block_shape) in enumerate(
            [(1, 512, 500, (8, 1)), (40, 300, 130, (8, 4)), (7, 17, 33, (3, 5)), (200, 128, 64, (16, 16))] * 2
        )
    ]

    def run(i: int) -> tuple[torch.Tensor, ...]:
        w = made[i].weights
        indices = (w.crow_indices, w.col_indices)
        y = ops.block_sparse_linear.default(*made[i].args())
        grad_x = ops.block_sparse_grad_input.default(y, *made[i].args()[1:7])
        return y, grad_x, ops.block_sparse_grad_values.default(y, made[i].x, *indices, *w.block_shape)

    expected = [run(i) for i in range(len(made))]

    def work(i: int) -> None:
        for _ in range(10):
            for actual, first in zip(run(i), expected[i], strict=True):
                assert_same_bits(actual, first)

    in_threads(len(made), work)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_many_threads_call_distill_loss(native: str, divergence: str) -> None:
    """Forward and backward; rows shared out whole, and parts of few long rows."""
    made = [
        distill_inputs(DistillCase(rows, vocab, ""), seed=i)
        for i, (rows, vocab) in enumerate([(200, 300), (1, 50000), (3, 33000), (5, 7)] * 2)
    ]

    def run(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        student = made[i].student.clone().requires_grad_()
        loss = distill_loss(
            student, made[i].teacher, made[i].labels, divergence=divergence, ce_weight=1.0, entropy_weight=0.1
        )
        (grad,) = torch.autograd.grad(loss * 0.5, student)
        return loss.detach(), grad

    expected = [run(i) for i in range(len(made))]

    def work(i: int) -> None:
        for _ in range(10):
            for actual, first in zip(run(i), expected[i], strict=True):
                assert_same_bits(actual, first)

    in_threads(len(made), work)


def test_many_threads_call_one_layer() -> None:
    linear = Int8Linear.from_linear(torch.nn.Linear(300, 200))
    table = Int8Embedding.from_embedding(torch.nn.Embedding(500, 300))
    indices = [torch.randint(0, 500, (5, 3 + i)) for i in range(8)]
    expected = [linear(table(i)).detach() for i in indices]

    def work(i: int) -> None:
        for _ in range(20):
            with torch.inference_mode():
                y = linear(table(indices[i]))
            assert_same_bits(y, expected[i])

    in_threads(8, work)


def test_first_use_in_many_threads(run_python) -> None:  # type: ignore[no-untyped-def]
    """Loading the extension and choosing a backend happen on first use, here in eight threads at once."""
    script = """
import threading, torch, lissom
q, s = lissom.formats.quantize_int8(torch.randn(64, 96))
x = torch.randn(50, 96)
out = [None] * 8
barrier = threading.Barrier(8)
def body(i):
    barrier.wait()
    out[i] = lissom.ops.int8_linear(x, q, s)
threads = [threading.Thread(target=body, args=(i,)) for i in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(all(torch.equal(y, out[0]) for y in out))
"""
    result = run_python(script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"


PRELUDE = """
import os, sys, time, threading, torch, lissom
def tasks():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
baseline = tasks()
weight = torch.randn(600, 700)
q, s = lissom.formats.quantize_int8(weight)
x = torch.randn(300, 700)
table = torch.randint(-9, 9, (3000, 256), dtype=torch.int8)
scale = torch.rand(3000)
index = torch.arange(3000)
def ops():
    y = lissom.ops.int8_linear(x, q, s)
    lissom.ops.int8_embedding(index, table, scale)
    return y
"""


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_set_num_threads_is_obeyed(threads: int, run_python) -> None:  # type: ignore[no-untyped-def]
    """Counted in /proc/self/task: n threads are the calling one and n - 1 that the process gains."""
    script = (
        PRELUDE
        + f"""
assert tasks() == baseline, "something else started threads"
torch.set_num_threads({threads})
for _ in range(5):
    ops()
print(tasks() - baseline)
"""
    )
    result = run_python(script, LISSOM_BACKEND="native")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == threads - 1


@pytest.mark.usefixtures("needs_native")
def test_one_thread_from_many_python_threads(run_python) -> None:  # type: ignore[no-untyped-def]
    """With set_num_threads(1) a server's worker threads compute alone: no helper threads appear."""
    script = (
        PRELUDE
        + """
before = tasks()
barrier = threading.Barrier(5)
def body():
    for _ in range(3):
        ops()
    barrier.wait()
    barrier.wait()
workers = [threading.Thread(target=body) for _ in range(4)]
[w.start() for w in workers]
barrier.wait()
print(tasks() - before)
barrier.wait()
[w.join() for w in workers]
"""
    )
    result = run_python(script, LISSOM_BACKEND="native")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 4, "only the four Python threads"


FORK = """
def wait(pid, seconds=40):
    # The exit code of a child; a hanging one is ended and reported.
    deadline = time.time() + seconds
    while time.time() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"

def child(expected):
    pid = os.fork()
    if pid:
        return wait(pid)
    code = 3
    try:
        for _ in range(3):
            code = 0 if ops().numpy().tobytes() == expected else 4
            if code:
                break
    finally:
        os._exit(code)
"""


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize(
    "before",
    ["", "ops();", "torch.randn(900, 900) @ torch.randn(900, 900); torch.randn(3000000).exp()"],
    ids=["unused", "lissom used the pool", "torch alone used the pool"],
)
def test_fork(before: str, run_python) -> None:  # type: ignore[no-untyped-def]
    """libgomp's threads do not survive a fork: a child that waited for them would wait for ever."""
    script = (
        PRELUDE
        + FORK
        + f"""
expected = ops().numpy().tobytes()
assert tasks() == baseline
torch.set_num_threads(2)
{before}
assert (tasks() > baseline) == {bool(before)}
print(child(expected), child(expected))
assert ops().numpy().tobytes() == expected  # the parent goes on
"""
    )
    result = run_python(script, LISSOM_BACKEND="native")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0", "0"]


@pytest.mark.usefixtures("needs_native")
def test_fork_of_a_fork_and_from_a_thread(run_python) -> None:  # type: ignore[no-untyped-def]
    script = (
        PRELUDE
        + FORK
        + """
torch.set_num_threads(2)
expected = ops().numpy().tobytes()
pid = os.fork()
if pid == 0:
    try:
        code = child(expected)
    except BaseException:
        code = 5
    os._exit(code if isinstance(code, int) else 6)
codes = [wait(pid)]
thread = threading.Thread(target=lambda: (ops(), codes.append(child(expected))))
thread.start(); thread.join()
print(*codes)
"""
    )
    result = run_python(script, LISSOM_BACKEND="native")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0", "0"]


@pytest.mark.usefixtures("needs_native")
def test_multiprocessing_fork(run_python) -> None:  # type: ignore[no-untyped-def]
    script = (
        PRELUDE
        + """
import multiprocessing as mp
torch.set_num_threads(2)
expected = ops().numpy().tobytes()
def body(i):
    return ops().numpy().tobytes() == expected
with mp.get_context("fork").Pool(2) as pool:
    print(pool.map_async(body, range(4)).get(timeout=60))
"""
    )
    result = run_python(script, LISSOM_BACKEND="native")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[True, True, True, True]"


@pytest.mark.usefixtures("needs_native")
def test_fork_before_first_use(run_python) -> None:  # type: ignore[no-untyped-def]
    """A server that forks after torch has warmed up and before lissom's first call."""
    script = (
        FORK.replace("def wait", "import os, time, torch, lissom\ndef wait", 1)
        + """
torch.set_num_threads(2)
torch.randn(900, 900) @ torch.randn(900, 900); torch.randn(3000000).exp()
q, s = torch.ones(600, 700, dtype=torch.int8), torch.ones(600)
x = torch.ones(300, 700)
def ops():
    return lissom.ops.int8_linear(x, q, s)
print(child(torch.full((300, 600), 700.0).numpy().tobytes()))
"""
    )
    result = run_python(script, LISSOM_BACKEND="native")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0"]
