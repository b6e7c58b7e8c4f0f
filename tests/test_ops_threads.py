"""Work on large host arrays is shared out among threads, and gives what one thread gives."""

import numpy as np
import pytest

from cupybnn import nn, ops, settings
from cupybnn.autograd import Tensor
from cupybnn.backends import numpy_threads

LARGE = 2 * numpy_threads.ELEMENTS_A_CALL


def cut(shape, axis):
    """Return how often each element was in a part, and the number of parts."""
    seen = np.zeros(shape, np.int64)
    parts = []

    def work(part):
        seen[part] += 1
        parts.append(part)

    numpy_threads.parallel_parts(seen, axis, work)
    return seen, len(parts)


@pytest.fixture
def threads(monkeypatch):
    def choose(number):
        monkeypatch.setattr(settings, "cpu_threads", lambda: number)

    monkeypatch.setattr(numpy_threads, "_pool", None)
    yield choose
    if numpy_threads._pool is not None:
        numpy_threads._pool.shutdown()


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("shape", [(LARGE,), (1024, LARGE // 1024), (3, 7, LARGE // 20)])
def test_parts_are_the_whole_once(shape, axis, threads):
    threads(3)
    seen, parts = cut(shape, axis)
    assert (seen == 1).all()
    assert parts > 1 or shape[axis] <= 16


@pytest.mark.parametrize("shape", [(), (0, 5), (100, 100)])
def test_little_work_is_not_cut(shape, threads):
    threads(3)
    seen, parts = cut(shape, 0)
    assert (seen == 1).all()
    assert parts == 1


def step():
    """Run a batch norm and a sign forward and backward; return all that comes out, as bytes."""
    random = np.random.default_rng(5)
    x = Tensor(random.standard_normal((1100, 500), np.float32), requires_grad=True)
    norm = nn.BatchNorm(500)
    y = ops.sign(norm(x))
    y.backward(random.standard_normal(y.shape, np.float32))
    results = (y.data, x.grad, norm.gamma.grad, norm.beta.grad, norm.mean, norm.variance)
    return [array.tobytes() for array in results]


def test_numbers_do_not_depend_on_threads(threads):
    threads(1)
    alone = step()
    threads(3)
    assert step() == alone
