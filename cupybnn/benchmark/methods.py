"""The methods of multiplication that are timed: ours, and the dense peers.

A method prepares `sets` independent sets of operands and returns a call for each. A call keeps its
result until it is repeated, so that results rotate through memory as the operands do, and each
library allocates memory as in normal use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from cupybnn.backends.devices import Device
from cupybnn.benchmark.shapes import Shape
from cupybnn.gemm import xnor_gemm, xnor_gemm_packed
from cupybnn.packed import pack

__all__ = [
    "BASELINE",
    "Method",
    "Operands",
    "Prepared",
    "Unsupported",
    "methods_for",
    "printable",
    "random_floats",
    "record_error",
    "summarize_error",
]

#: The method that speedups are relative to.
BASELINE = {"cuda": "CuPy float32", "cpu": "NumPy float32"}


class Unsupported(Exception):
    """A method does not support a product; the message says why."""


def summarize_error(error: Exception) -> str:
    """Return the type and the first line of an error, for the row of a failed method."""
    return printable(f"{type(error).__name__}: {error}".splitlines()[0])


@contextlib.contextmanager
def record_error(row: dict[str, Any]) -> Iterator[None]:
    """Context that stores an error in a row instead of raising it, so that other rows are kept."""
    try:
        yield
    except Unsupported as error:
        row["error"] = str(error)
    except Exception as error:
        row["error"] = summarize_error(error)


def printable(text: str) -> str:
    """Return the beginning of a text without control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:300])


@lru_cache(maxsize=8)
def _generator(device: Device) -> Any:
    # One per device: setting up CuPy's takes longer than most products.
    return device.xp.random.default_rng(0)


def random_floats(device: Device, shape: tuple[int, ...]) -> Any:
    """Return new random float32 numbers, uniform in [-1, 1), on the current device."""
    xp = device.xp
    x = _generator(device).random(shape, dtype=xp.float32)
    x -= xp.float32(0.5)
    x *= xp.float32(2)
    return x


@dataclass
class Operands:
    """Makes random operands for a method."""

    device: Device
    shape: Shape

    def a(self) -> Any:
        """Return a left operand, (m, k)."""
        return random_floats(self.device, (self.shape.m, self.shape.k))

    def b(self) -> Any:
        """Return a right operand, (k, n)."""
        return random_floats(self.device, (self.shape.k, self.shape.n))


@dataclass
class Prepared:
    """Calls to be timed, and what is needed to check the result of the first."""

    calls: list[Callable[[], None]]
    results: list[Any]
    operand_bytes: int
    a0: Any = None  # the float operands of the first call, if they are kept
    b0: Any = None

    def bytes_moved(self) -> int:
        """Return the size of a call's operands and result in bytes, each counted once."""
        first = self.results[0]
        # torch tensors have nbytes too.
        return self.operand_bytes + int(first.nbytes)


@dataclass(frozen=True)
class Method:
    """One method of multiplication.

    Attributes
    ----------
    name : str
        Name in the tables.
    ours : bool
        Whether it is a product of this library, whose result is checked.
    operand_bits : tuple of int
        Bits per element of a and of b, to compute the size of operands before they are made.
    result_bits : int
    make : callable(Operands) -> (call, a0, b0, operand bytes)
        Makes one set of operands, and the call that multiplies them.
    scope : callable() -> context manager
        Context for setup, warm-up and timing.
    largest : int
        Products with more multiplications are skipped, because they would take too long.
    """

    name: str
    ours: bool
    operand_bits: tuple[int, int]
    result_bits: int
    make: Callable[[Operands], tuple[Callable[[], Any], Any, Any, int]]
    scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    largest: int = 1 << 62

    def set_bytes(self, shape: Shape) -> int:
        """Return the approximate size of one set of operands and its result in bytes."""
        bits = self.operand_bits[0] * shape.m * shape.k + self.operand_bits[1] * shape.k * shape.n
        return (bits + self.result_bits * shape.m * shape.n) // 8

    def prepare(self, shape: Shape, device: Device, sets: int) -> Prepared:
        """Make `sets` sets of operands and their calls."""
        operands = Operands(device, shape)
        results: list[Any] = [None] * sets
        prepared = Prepared([], results, 0)
        for i in range(sets):
            multiply, a, b, nbytes = self.make(operands)
            if i == 0:
                prepared.a0, prepared.b0, prepared.operand_bytes = a, b, nbytes
            prepared.calls.append(partial(_keep, results, i, multiply))
        return prepared


def _keep(results: list[Any], i: int, multiply: Callable[[], Any]) -> None:
    results[i] = multiply()


def _packed_to(dtype: Any) -> Callable[[Operands], Any]:
    def make(operands: Operands) -> tuple[Callable[[], Any], Any, Any, int]:
        a, b = operands.a(), operands.b()
        pa, pb = pack(a, axis=-1), pack(b, axis=-2)
        nbytes = pa.nbytes + pb.nbytes
        if dtype is None:
            return (lambda: xnor_gemm_packed(pa, pb)), a, b, nbytes
        return (lambda: xnor_gemm(pa, pb, dtype=dtype)), a, b, nbytes

    return make


def _arrays(operands: Operands) -> tuple[Callable[[], Any], Any, Any, int]:
    a, b = operands.a(), operands.b()
    return (lambda: xnor_gemm(a, b)), a, b, a.nbytes + b.nbytes


def _packed_weights(operands: Operands) -> tuple[Callable[[], Any], Any, Any, int]:
    a, b = operands.a(), operands.b()
    pb = pack(b, axis=-2)
    return (lambda: xnor_gemm(a, pb)), a, b, a.nbytes + pb.nbytes


OURS = (
    Method("packed -> packed", True, (1, 1), 1, _packed_to(None)),
    Method("packed -> int32", True, (1, 1), 32, _packed_to(np.int32)),
    Method("packed -> float16", True, (1, 1), 16, _packed_to(np.float16)),
    Method("float32 x packed -> float32", True, (32, 1), 32, _packed_weights),
    Method("float32 -> float32", True, (32, 32), 32, _arrays),
)


def _dense(dtype: Any) -> Callable[[Operands], Any]:
    def make(operands: Operands) -> tuple[Callable[[], Any], Any, Any, int]:
        xp = operands.device.xp
        a, b = (x.astype(dtype, copy=False) for x in (operands.a(), operands.b()))
        return (lambda: xp.matmul(a, b)), a, b, a.nbytes + b.nbytes

    return make


@contextlib.contextmanager
def _cupy_float32_as(name: str) -> Iterator[None]:
    """Set CuPy's compute type for float32 products; CUPY_TF32 is read only once per process."""
    from cupy._core import _routines_linalg as linalg

    before = linalg.get_compute_type(np.float32)
    linalg.set_compute_type(np.float32, getattr(linalg, name))
    try:
        yield
    finally:
        linalg.set_compute_type(np.float32, before)


def _torch_tensors(operands: Operands) -> tuple[Any, Any, Any]:
    """Return torch and both operands as float32 tensors that share CuPy's memory."""
    import torch

    a, b = operands.a(), operands.b()
    return torch, torch.from_dlpack(a), torch.from_dlpack(b)


def _torch_bf16(operands: Operands) -> tuple[Callable[[], Any], Any, Any, int]:
    torch, a, b = _torch_tensors(operands)
    a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    return (lambda: torch.matmul(a, b)), None, None, a.nbytes + b.nbytes


def _torch_int8(operands: Operands) -> tuple[Callable[[], Any], Any, Any, int]:
    s = operands.shape
    if s.m <= 16 or s.n % 8 or s.k % 8:
        raise Unsupported("torch._int_mm needs M > 16, and N and K that are multiples of 8")
    torch, a, b = _torch_tensors(operands)
    a = (a * 127).to(torch.int8)
    b = (b.t() * 127).to(torch.int8).contiguous().t()  # column-major, its fast layout
    return (lambda: torch._int_mm(a, b)), None, None, a.nbytes + b.nbytes


def _torch_fp8(operands: Operands) -> tuple[Callable[[], Any], Any, Any, int]:
    s = operands.shape
    if s.n % 16 or s.k % 16:
        raise Unsupported("torch._scaled_mm needs N and K that are multiples of 16")
    torch, a, b = _torch_tensors(operands)
    a = a.to(torch.float8_e4m3fn)
    b = b.t().contiguous().to(torch.float8_e4m3fn).t()  # it requires a column-major b
    one = torch.ones((), device=a.device, dtype=torch.float32)
    multiply = partial(
        torch._scaled_mm,
        a,
        b,
        scale_a=one,
        scale_b=one,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return multiply, None, None, a.nbytes + b.nbytes


CUPY = (
    Method(
        "CuPy float32",
        False,
        (32, 32),
        32,
        _dense(np.float32),
        partial(_cupy_float32_as, "COMPUTE_TYPE_DEFAULT"),
        largest=1 << 42,
    ),
    Method(
        "CuPy TF32",
        False,
        (32, 32),
        32,
        _dense(np.float32),
        partial(_cupy_float32_as, "COMPUTE_TYPE_TF32"),
    ),
    Method("CuPy float16", False, (16, 16), 16, _dense(np.float16)),
)
TORCH = (
    Method("torch bfloat16", False, (16, 16), 16, _torch_bf16),
    Method("torch int8", False, (8, 8), 32, _torch_int8),
    Method("torch fp8", False, (8, 8), 16, _torch_fp8),
)
NUMPY = (Method("NumPy float32", False, (32, 32), 32, _dense(np.float32)),)


def methods_for(device: Device) -> tuple[tuple[Method, ...], list[str]]:
    """Return the methods for a device, and a sentence for each peer that is not measured."""
    if device.kind == "cpu":
        ours = tuple(m for m in OURS if m.name != "packed -> float16")
        return (*ours, *NUMPY), []
    try:
        import torch
    except Exception as error:  # a broken installation counts as missing
        return (*OURS, *CUPY), [f"PyTorch is not measured: {type(error).__name__}: {error}"]
    if not torch.cuda.is_available():
        return (*OURS, *CUPY), [f"PyTorch {torch.__version__} is not measured: it sees no GPU."]
    return (*OURS, *CUPY, *TORCH), []
