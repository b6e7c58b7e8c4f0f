"""Time xnor_gemm on NumPy against numpy.matmul of the same ±1 matrices in float32.

    python bench/numpy_product.py [--json FILE]
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python bench/numpy_product.py --cpu-time

The second form measures the processor time of one thread, for a busy machine.

Three products of every shape are timed in turn in one loop, so that other load affects them alike:
matmul of +1 and -1 (converted beforehand), xnor_gemm of random float32 (including the conversion of
both operands), xnor_gemm of packed operands. The table gives medians; each ratio is the median over
rounds of xnor_gemm's time divided by matmul's time in that round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

import cupybnn
from cupybnn.files import atomic_write
from cupybnn.machine import describe

SHAPES = [
    (16, 16, 16),
    (64, 64, 64),
    (128, 128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (100, 784, 512),
    (128, 512, 512),
    (1024, 784, 1024),
    (1000, 999, 1001),
    (4096, 784, 10),
    (1, 4096, 4096),
    (4096, 4096, 1),
    (2, 4096, 4096),
    (4, 4096, 4096),
    (16, 4096, 4096),
    (64, 4096, 4096),
    (4096, 64, 4096),
]


def time_in_turn(
    calls: list[Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> np.ndarray:
    """Return seconds per call, shape (rounds, calls): at least 7 rounds, about `seconds` in all."""
    for call in calls:
        call()
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 7 or (time.perf_counter() < end and len(rounds) < 2000):
        row = []
        for call in calls:
            start = clock()
            call()
            row.append(clock() - start)
        rounds.append(row)
    return np.array(rounds)


def measure(
    m: int, k: int, n: int, seconds: float, clock: Callable[[], float]
) -> dict[str, object]:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((m, k), dtype=np.float32)
    b = rng.standard_normal((k, n), dtype=np.float32)
    signs_a, signs_b = cupybnn.sign(a), cupybnn.sign(b)
    packed_a, packed_b = cupybnn.pack(a), cupybnn.pack(b, axis=-2)
    expected = signs_a @ signs_b
    assert np.array_equal(cupybnn.xnor_gemm(a, b), expected)
    assert np.array_equal(cupybnn.xnor_gemm(packed_a, packed_b), expected)
    times = time_in_turn(
        [
            lambda: np.matmul(signs_a, signs_b),
            lambda: cupybnn.xnor_gemm(a, b),
            lambda: cupybnn.xnor_gemm(packed_a, packed_b),
        ],
        seconds,
        clock,
    )
    matmul, arrays, packed = np.median(times, axis=0)
    return {
        "shape": [m, k, n],
        "rounds": len(times),
        "matmul_us": matmul * 1e6,
        "arrays_us": arrays * 1e6,
        "packed_us": packed * 1e6,
        "arrays_ratio": float(np.median(times[:, 1] / times[:, 0])),
        "packed_ratio": float(np.median(times[:, 2] / times[:, 0])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each shape")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread")
    args = parser.parse_args()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    machine = describe()
    print(
        f"{machine['cpu']}, {machine['cpus']} cores, NumPy {machine['numpy']}, "
        f"{'processor time of one thread' if args.cpu_time else 'time on the clock'}"
    )
    print(
        f"{'M, K, N':>18}  {'matmul':>10}  {'arrays':>10} {'ratio':>6}  {'packed':>10} {'ratio':>6}"
    )
    rows = []
    for shape in SHAPES:
        row = measure(*shape, args.seconds, clock)
        rows.append(row)
        name = ", ".join(map(str, shape))
        print(
            f"{name:>18}  {row['matmul_us']:8.0f}us  {row['arrays_us']:8.0f}us "
            f"{row['arrays_ratio']:6.2f}  {row['packed_us']:8.0f}us {row['packed_ratio']:6.2f}",
            flush=True,
        )
    if args.json:
        record = {"machine": machine, "cpu_time": args.cpu_time, "rows": rows}
        with atomic_write(args.json) as file:
            file.write(json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
