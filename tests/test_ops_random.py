"""The counter-based generator: known answers, and one stream on both backends."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import host

from cupybnn import backends
from cupybnn.backends.devices import CPU, Device
from cupybnn.backends.random import Stream, bernoulli, random_words, uniform

# From the authors' known-answer file (kat_vectors of Random123): counter, key, result.
KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(xp, counter, key, expected):
    backend = backends.get(CPU if xp is np else Device("cuda"))
    block, draw, seed = (low | high << 32 for low, high in (counter[:2], counter[2:], key))
    np.testing.assert_array_equal(host(backend.random_words((4,), seed, draw, block)), expected)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 4 * 4096, 4 * 4096 + 1, 50_000])
def test_length_does_not_change_the_numbers(xp, size):
    words = host(random_words((size,), 7, 11, xp))
    assert words.shape == (size,)
    assert words.dtype == np.uint32
    np.testing.assert_array_equal(words, host(random_words((60_000,), 7, 11, xp))[:size])


@pytest.mark.parametrize("shape", [(10_001,), (), (0, 3), (7, 5, 3), (2**20 + 3,)])
def test_backends_agree(xp, shape):
    seed, counter = 2**63 + 5, 2**40
    for draw in (random_words, uniform):
        ours, expected = draw(shape, seed, counter, xp), draw(shape, seed, counter, np)
        assert (ours.shape, ours.dtype) == (shape, expected.dtype)
        assert host(ours).tobytes() == expected.tobytes()


@pytest.mark.gpu
def test_a_captured_graph_raises_the_counter():
    import cupy

    counter = cupy.asarray(5, np.uint64)
    out = cupy.empty(1000, np.uint32)
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.get_current_stream().synchronize()

    def step():
        nonlocal counter
        out[...] = random_words((1000,), 7, counter, cupy)
        counter += 1

    with stream, cupy.cuda.using_allocator(pool.malloc):
        step()  # compiles what it needs, and leaves its memory to the pool
        stream.synchronize()
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        for number in (6, 7, 8):
            graph.launch()
            stream.synchronize()
            np.testing.assert_array_equal(host(out), random_words((1000,), 7, number, np))


def test_counter_may_be_an_array_on_the_device(xp):
    counter = xp.asarray(12, np.uint64)
    np.testing.assert_array_equal(
        host(random_words((100,), 7, counter, xp)), host(random_words((100,), 7, 12, xp))
    )


def test_uniform(xp):
    u = host(uniform((300, 400), 0, 0, xp))
    assert u.dtype == np.float32
    assert u.min() >= 0
    assert u.max() < 1
    # 120,000 numbers: mean within five standard errors, and a flat histogram (chi-squared).
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size)
    counts = np.histogram(u, 100, (0, 1))[0]
    assert ((counts - 1200) ** 2 / 1200).sum() < 99 + 5 * np.sqrt(2 * 99)
    neighbors = np.corrcoef(u.ravel()[:-1], u.ravel()[1:])[0, 1]
    assert abs(neighbors) < 5 / np.sqrt(u.size)


def test_chosen(xp):
    words = random_words((40_000,), 5, 6, xp)
    assert host(bernoulli(words, 1.0)).all()
    assert not host(bernoulli(words, 1e-12)).any()
    mask = host(bernoulli(words, 0.25))
    np.testing.assert_array_equal(mask, host(uniform((40_000,), 5, 6, xp)) < 0.25)
    for part in (mask, ~mask):  # five standard errors
        assert abs((host(words)[part] & 1).mean() - 0.5) < 2.5 / np.sqrt(part.sum())


def test_stream():
    stream = Stream(2**63)
    assert [stream.next() for _ in range(3)] == [(2**63, 0), (2**63, 1), (2**63, 2)]
    other = Stream(0)
    other.state[...] = stream.state
    assert other.next() == (2**63, 3)
