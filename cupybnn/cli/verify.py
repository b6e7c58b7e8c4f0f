"""``cupybnn verify``: compare xnor_gemm with plain products of ±1, element by element."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends import numpy_backend
from cupybnn.backends.devices import (
    CPU,
    Device,
    array_module,
    cuda_status,
    resolve,
    synchronize,
    to_device,
)
from cupybnn.errors import SettingError

__all__ = ["CASES", "Case", "Outcome", "add_parser", "check", "kinds", "run"]


@dataclass(frozen=True)
class Case:
    """One product: the shapes and the memory layout of both operands."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    layout: str = "rows"

    def __str__(self) -> str:
        layout = "" if self.layout == "rows" else f", {self.layout}"
        return f"{self.a} @ {self.b}{layout}"


#: Shapes at which a kernel is likely to fail: one element, one row, one column, just below and
#: above the sizes of words, chunks and tiles, long and short K, batches, transposed and strided.
CASES = (
    Case((1, 1), (1, 1)),
    Case((1, 31), (31, 1)),
    Case((3, 5), (5, 7)),
    Case((0, 8), (8, 3)),
    Case((4, 0), (0, 5)),
    Case((63,), (63,)),
    Case((16, 32), (32, 8)),
    Case((17, 33), (33, 31)),
    Case((64, 64), (64, 64), "transposed"),
    Case((65, 127), (127, 63)),
    Case((127, 1023), (1023, 129)),
    Case((128, 1024), (1024, 128)),
    Case((129, 1025), (1025, 257), "transposed"),
    Case((257, 2047), (2047, 511), "strided"),
    Case((1, 16384), (16384, 1000)),
    Case((1000, 4097), (4097, 1)),
    Case((16, 8191), (8191, 777)),
    Case((2, 70001), (70001, 3)),
    Case((512, 512), (512, 512)),
    Case((1000, 784), (784, 513), "strided"),
    Case((1023, 1536), (1536, 1025)),
    Case((5, 33, 65), (5, 65, 97)),
    Case((3, 1, 40, 129), (2, 129, 24)),
)


def kinds(case: Case) -> tuple[str, ...]:
    """Return the ways to multiply a case; only matrices have scales, thresholds and levels."""
    matrices = len(case.a) > 1 and len(case.b) > 1
    return ("arrays", "packed", "scaled", "signs", "levels") if matrices else ("arrays", "packed")


@dataclass(frozen=True)
class Outcome:
    """The result of one comparison; ``problem`` is empty if every element is equal."""

    device: str
    kernel: str
    case: Case
    kind: str
    elements: int
    seconds: float
    problem: str = ""

    def line(self) -> str:
        """Return the outcome as one line of the report."""
        what = f"{self.device:<7} {self.kernel:<16} {self.kind:<7} {self.case}"
        if self.problem:
            return f"{what}  {self.problem}"
        count = f"{self.elements:,} element{'s' * (self.elements != 1)}"
        return f"{what}  equal ({count}, {self.seconds * 1e3:.1f} ms)"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of ``cupybnn verify``."""
    parser = subparsers.add_parser(
        "verify",
        help="check every kernel on this machine against a plain product, element by element",
        description=(
            "Multiply random matrices of +1 and -1 with xnor_gemm and with matmul, and compare "
            "every element, for each kernel that this machine can run and a list of difficult "
            "shapes, in five ways: from arrays, from packed matrices, with scales and a bias "
            "('scaled'), with thresholds and a packed result ('signs'), and of levels of two bits "
            "with signs ('levels'). The exit code is 1 if anything differs."
        ),
    )
    parser.add_argument(
        "--device",
        metavar="D",
        default="all",
        help="all (the default: the CPU and every CUDA device), cpu, cuda or cuda:N",
    )
    parser.add_argument(
        "--kernel",
        action="append",
        metavar="NAME",
        help="check only this kernel; may be repeated",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the random matrices (default 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Print a line for each comparison and a summary."""
    if args.seed < 0:
        raise SettingError(f"The '--seed' must be at least 0; got {args.seed}.")
    devices = _devices(args.device)
    count = 0
    failed = 0
    kernels = [(d, k) for d in devices for k in _kernels(d) if not args.kernel or k in args.kernel]
    if not kernels:
        known = sorted({k for d in devices for k in _kernels(d)})
        raise SettingError(
            f"The '--kernel' must be one that this machine can run ({', '.join(known)}); "
            f"got {', '.join(args.kernel)}."
        )
    for device, kernel in kernels:
        for outcome in check(device, kernel, seed=args.seed):
            count += 1
            failed += bool(outcome.problem)
            print(outcome.line(), flush=True)
    if args.device == "all" and not cuda_status().available:
        print(f"No CUDA device was checked. {cuda_status().reason}")
    names = ", ".join(f"{kernel} on {device}" for device, kernel in kernels)
    if failed:
        print(f"{failed} of {count} comparisons FAILED ({names}).")
        return 1
    print(f"All {count} comparisons are equal ({names}).")
    return 0


def _devices(name: str) -> list[Device]:
    if name == "all":
        return [CPU, *(Device("cuda", i) for i in range(cuda_status().device_count))]
    return [resolve(name)]


def _kernels(device: Device) -> list[str]:
    if device.kind == "cpu":
        return numpy_backend.kernels()
    from cupybnn.backends import cuda

    return list(cuda.kernels_for(device))


def _forced(device: Device, kernel: str) -> contextlib.AbstractContextManager[Any]:
    if device.kind == "cpu":
        return numpy_backend.force_kernel(kernel)
    from cupybnn.backends import cuda

    return cuda.force_kernel(kernel)


def check(
    device: Device, kernel: str, *, cases: tuple[Case, ...] = CASES, seed: int = 0
) -> Iterator[Outcome]:
    """Compare one kernel on one device with a plain product.

    Parameters
    ----------
    device : Device
    kernel : str
        A name from the backend's list of kernels; "numpy" or "numba" on the CPU.
    cases : tuple of Case
    seed : int
        Seed of the random ±1 matrices.

    Yields
    ------
    Outcome
        One for each case and each of its `kinds`.
    """
    rng = np.random.default_rng(seed)
    for case in cases:
        a, b = _signs(rng, case.a, case.layout), _signs(rng, case.b, case.layout)
        # Exact in float32, because |sum| <= K < 2**24; always computed on the host.
        product = np.matmul(a, b)
        terms = _terms(rng, a, b, product)
        # Copying to a device keeps transposed layouts; a strided one is made on the device.
        with device.scope():
            a_device, b_device = (_on_device(x, device, case.layout) for x in (a, b))
        for kind in kinds(case):
            want = _wanted(product, kind, terms)
            start = time.perf_counter()
            try:
                with device.scope(), _forced(device, kernel):
                    terms_device = {name: to_device(x, device) for name, x in terms.items()}
                    got = _product(a_device, b_device, kind, terms_device)
                    synchronize(device)
                    got = np.asarray(to_device(got, CPU))
                problem = _difference(got, want)
            except Exception as error:  # reported in its line; the other cases still run
                problem = f"FAILED: {type(error).__name__}: {error}"
            yield Outcome(
                str(device),
                kernel,
                case,
                kind,
                int(product.size),
                time.perf_counter() - start,
                problem,
            )


def _terms(
    rng: np.random.Generator, a: np.ndarray, b: np.ndarray, product: np.ndarray
) -> dict[str, Any]:
    """Return random scales, bias, thresholds and flips for a product of matrices, and levels."""
    if product.ndim < 2:
        return {}
    (m, n), k = product.shape[-2:], a.shape[-1]
    times = rng.choice([np.float32(1), np.float32(3)], k)
    spread = int(k**0.5) + 1  # of a product of random signs, so that thresholds fall among them
    return {
        "row": rng.standard_normal((m, 1), np.float32),
        "column": rng.standard_normal((n,), np.float32),
        "bias": rng.standard_normal((n,), np.float32),
        "threshold": rng.integers(-spread, spread + 1, n).astype(np.int32),
        "flip": rng.random(n) < 0.5,
        "times": times,  # a's signs times these are levels of two bits
        "of levels": np.matmul(a * times, b),
    }


def _wanted(product: np.ndarray, kind: str, terms: dict[str, Any]) -> np.ndarray:
    """Return the expected result of a kind of product, by the documented formulas."""
    if kind == "scaled":
        return product * terms["row"] * terms["column"] + terms["bias"]
    if kind == "signs":
        plus = (product >= terms["threshold"]) != terms["flip"]
        return _with_counts(np.where(plus, np.float32(1), np.float32(-1)), plus.sum(axis=-1))
    if kind == "levels":
        levels: np.ndarray = terms["of levels"]
        return levels
    return product


def _with_counts(signs: Any, popcounts: Any) -> Any:
    """Return signs with the number of +1 in each row as an additional column."""
    counts = popcounts.astype(np.float32)[..., None]
    return array_module(signs, counts).concatenate([signs, counts], axis=-1)


def _signs(rng: np.random.Generator, shape: tuple[int, ...], layout: str) -> np.ndarray:
    if layout == "transposed":
        shape = (*shape[:-2], shape[-1], shape[-2])
    x = np.where(rng.random(shape, dtype=np.float32) < 0.5, np.float32(-1), np.float32(1))
    return x.swapaxes(-1, -2) if layout == "transposed" else x


def _on_device(x: np.ndarray, device: Device, layout: str) -> Any:
    """Return `x` on `device` in the given layout."""
    xp = device.xp
    if layout == "transposed":
        return to_device(np.ascontiguousarray(x.swapaxes(-1, -2)), device).swapaxes(-1, -2)
    copy = to_device(x, device)
    if layout == "strided":
        # Every second row and third column of a larger array whose other elements are NaN.
        large = xp.full((x.shape[0] * 2, x.shape[1] * 3), xp.nan, dtype=x.dtype)
        view = large[::2, 1::3]
        view[...] = copy
        return view
    return copy


def _product(a: Any, b: Any, kind: str, terms: dict[str, Any]) -> Any:
    from cupybnn import pack, xnor_gemm, xnor_gemm_packed

    if kind == "scaled":
        return xnor_gemm(a, b, scale=(terms["row"], terms["column"]), bias=terms["bias"])
    if kind == "signs":
        p = xnor_gemm_packed(a, b, threshold=terms["threshold"], flip=terms["flip"])
        return _with_counts(p.unpack(np.float32), p.popcounts)
    if kind == "levels":
        return xnor_gemm(pack(a * terms["times"], bits=2), pack(b, axis=-2))
    if kind == "packed":
        a, b = pack(a, axis=-1), pack(b, axis=-2 if b.ndim > 1 else -1)
    return xnor_gemm(a, b)


def _difference(got: np.ndarray, want: np.ndarray) -> str:
    """Describe the first element that differs; "" if none does."""
    if got.shape != want.shape:
        return f"DIFFERS: shape {got.shape}, plain product {want.shape}"
    wrong = got != want
    count = int(np.count_nonzero(wrong))
    if count == 0:
        return ""
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    return (
        f"DIFFERS at {list(first)}: xnor_gemm gives {got[first]}, the plain product {want[first]} "
        f"({count} of {want.size} elements differ)"
    )
