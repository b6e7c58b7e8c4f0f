"""Products of bit planes by every kernel and configuration on a GPU, by name, exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cupybnn import pack, xnor_gemm, xnor_gemm_packed
from cupybnn.backends.cuda import architectures, dispatch, planes
from cupybnn.backends.cuda.architectures import sm90, smxx
from cupybnn.backends.cuda.configs import Config, Problem
from cupybnn.backends.cuda.dispatch import force_kernel

pytestmark = pytest.mark.gpu

POISON = -(2**31)


def reachable() -> list[Config]:
    """Every configuration for several planes that is built in or that tuning measures, once."""
    lengths, ks = (1, 16, 33, 65, 256, 1024, 4096, 16384), (1, 2048, 8192, 12288, 70_000)
    found: dict[object, Config] = {}
    for m, n, k, packed in itertools.product(lengths, lengths, ks, (False, True)):
        for kernel, capability in (("sm90", 90), ("sm80", 80), ("sm80", 86), ("sm75", 75)):
            problem = Problem(
                m=m, n=n, k=k, packed=packed, planes=4, capability=capability, multiprocessors=132
            )
            chosen = dispatch.builtin_config(kernel, problem)
            for config in (chosen, *dispatch.candidates(kernel, problem)):
                found[config.kernel, config.defines, config.swap] = config
    return [smxx.config(), *found.values()]


CONFIGS = reachable()
#: Bits, whether signed, and whether the right operand has them.
KINDS = [(4, True, 0), (3, False, 1), (8, True, 1)]


def random_levels(shape: tuple[int, int], bits: int, signed: bool, seed: int = 0):
    import cupy

    numbers = cupy.random.RandomState(seed).randint(0, 2**bits, shape)
    return 2 * numbers - (2**bits - 1) if signed else numbers


def random_signs(shape: tuple[int, int], seed: int = 1):
    import cupy

    return 2 * cupy.random.RandomState(seed).randint(0, 2, shape) - 1


def exact(x, w):
    """Integer product through float64, which is exact here."""
    return (x.astype(np.float64) @ w.astype(np.float64)).astype(np.int64)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (config, kind)
        for config, two in zip(CONFIGS, itertools.cycle(KINDS), strict=False)
        for kind in (KINDS if config in (smxx.config(), sm90.LARGER) else [two])
    ],
    ids=str,
)
def test_around_the_edges_of_tiles(config, kind):
    import cupy

    bits, signed, of_b = kind

    if config.kernel not in architectures.kernels_for(int(cupy.cuda.Device().compute_capability)):
        pytest.skip(f"{config.kernel} does not run here")
    height, width = config.tile_m * config.cluster_m, config.tile_n * config.cluster_n
    shapes = [
        (height - 1, width + 1, 1025), (height + 1, width - 1, 1024), (1, 1, 5), (17, 3, 4100),
        (6 * height + 1, 4 * width - 3, 2049),
    ]  # fmt: skip
    for m, n, k in shapes:
        if config.swap:
            m, n = n, m
        x = random_levels((k, n) if of_b else (m, k), bits, signed)
        w = random_signs((m, k) if of_b else (k, n))
        p = pack(x, -2 if of_b else -1, bits, signed)
        q = pack(w, -1 if of_b else -2)
        pair, expected = ((q, p), exact(w, x)) if of_b else ((p, q), exact(x, w))
        with force_kernel(config):
            whole = cupy.full((m + 2, n + 3), POISON, np.int32)
            xnor_gemm(*pair, out=whole[1:-1, 1:-2])
            packed = None if config.swap else xnor_gemm_packed(*pair, threshold=7)
        cupy.testing.assert_array_equal(whole[1:-1, 1:-2], expected)
        whole[1:-1, 1:-2] = POISON
        assert bool((whole == POISON).all()), "written outside the result"
        if packed is not None:
            cupy.testing.assert_array_equal(packed.unpack(bool), expected >= 7)
            assert packed == pack(packed.unpack()), "padding is not zero"


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(300, 1100), (33, 17), (1, 4096), (1024, 1)])
@pytest.mark.parametrize("axis", [-1, -2])
def test_packed_words_are_those_of_the_cpu(bits, signed, shape, axis):
    x = random_levels(shape, bits, signed)
    on_gpu, on_cpu = pack(x, axis, bits, signed), pack(x.get(), axis, bits, signed)
    assert on_gpu.to_numpy() == on_cpu
    again = on_cpu.to_cupy()
    assert bool((again.words == on_gpu.words).all())
    assert bool((again.popcounts == on_gpu.popcounts).all())
    assert bool((on_gpu.unpack(int) == x).all())


def test_a_configuration_for_sixteen_bits_is_refused():
    x = pack(random_levels((64, 4096), 4, True), bits=4)
    w = pack(random_signs((4096, 64)), -2)
    for config in (sm90.SPLIT, sm90.config(1, 256, 4, deferred=4)):
        with force_kernel(config), pytest.raises(ValueError, match="several bit planes"):
            xnor_gemm(x, w)


def test_a_batch_of_matrices():
    import cupy

    x = random_levels((6, 40 * 1500), 4, True).reshape(2, 3, 40, 1500)
    w = random_signs((3, 1500 * 33)).reshape(3, 1500, 33)
    got = xnor_gemm(pack(x, -1, 4), pack(w, -2))
    cupy.testing.assert_array_equal(got, exact(x, w))
    assert planes.planes_shape(6, 40, 1500, 4) == pack(x, -1, 4).words.shape
