"""Settings of the engine as context managers and decorators: for what code each holds."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading

import numpy as np
import pytest
from arrays import leaf

from cupybnn.autograd import NonFiniteError, Tensor, debug, is_grad_enabled, no_grad


class TestNoGradOnAGenerator:
    def test_holds_in_the_body_and_not_between_its_steps(self):
        x = leaf(np)

        @no_grad()
        def doubled(times):
            for _ in range(times):
                yield x * 2
            assert not is_grad_enabled()

        assert inspect.isgeneratorfunction(doubled)
        assert doubled.__name__ == "doubled"
        steps = 0
        for y in doubled(times=3):
            steps += 1
            assert not y.requires_grad
            assert (x * 2).requires_grad
        assert steps == 3
        assert is_grad_enabled()

    def test_the_caller_may_change_it_between_two_steps(self):
        @no_grad()
        def seen():
            while True:
                yield is_grad_enabled()

        steps = seen()
        with no_grad():
            assert not next(steps)
            assert not is_grad_enabled()
        assert not next(steps)
        assert is_grad_enabled()

    def test_send_throw_close_and_return_pass_through(self):
        log = []

        @no_grad()
        def body():
            try:
                got = yield "first"
                try:
                    yield got
                except KeyError as error:
                    log.append((error, is_grad_enabled()))
                    yield "caught"
                return "result"
            finally:
                log.append(is_grad_enabled())

        def outer():
            return (yield from body())

        steps = outer()
        assert next(steps) == "first"
        assert steps.send("sent") == "sent"
        error = KeyError("x")
        assert steps.throw(error) == "caught"
        assert is_grad_enabled()
        with pytest.raises(StopIteration) as stop:
            next(steps)
        assert stop.value.value == "result"
        assert log == [(error, False), False]

        steps = body()
        next(steps)
        steps.close()
        assert log[2:] == [False]
        steps = body()
        next(steps)
        with pytest.raises(ValueError, match="uncaught"):
            steps.throw(ValueError("uncaught"))
        assert log[3:] == [False]
        assert is_grad_enabled()

    def test_an_error_in_the_body_ends_it(self):
        @no_grad()
        def body():
            yield 1
            raise KeyError

        steps = body()
        next(steps)
        with pytest.raises(KeyError):
            next(steps)
        assert is_grad_enabled()

    def test_a_generator_that_ignores_close(self):
        @no_grad()
        def body():
            try:
                yield
            except GeneratorExit:
                yield

        steps = body()
        next(steps)
        with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
            steps.close()
        assert is_grad_enabled()

    @pytest.mark.parametrize("kind", ["method", "static", "class", "partial", "callable", "bare"])
    def test_of_every_kind_of_function(self, kind):
        def body(*args):
            yield is_grad_enabled()

        class Owner:
            method = no_grad()(body)
            static = staticmethod(no_grad()(body))
            of_class = classmethod(no_grad()(body))

            def __call__(self):
                yield is_grad_enabled()

        function = {
            "method": Owner().method,
            "static": Owner.static,
            "class": Owner.of_class,
            "partial": no_grad()(functools.partial(body, 1)),
            "callable": no_grad()(Owner()),
            "bare": no_grad(body),
        }[kind]
        assert list(function()) == [False]


class TestNoGradOnAsynchronousFunctions:
    def test_coroutine(self):
        x = leaf(np)
        during_await = []

        async def elsewhere():
            await asyncio.sleep(0.001)
            during_await.append(is_grad_enabled())

        @no_grad()
        async def evaluate():
            assert not is_grad_enabled()
            await asyncio.sleep(0.002)
            with pytest.raises(ZeroDivisionError):
                await failing()
            return x * 2

        async def failing():
            await asyncio.sleep(0)
            return 1 / 0

        async def main():
            other = asyncio.create_task(elsewhere())
            y = await evaluate()
            await other
            return y.requires_grad, is_grad_enabled()

        assert inspect.iscoroutinefunction(evaluate)
        assert asyncio.run(main()) == (False, True)
        assert during_await == [True]

    def test_cancelled_coroutine(self):
        log = []

        @no_grad()
        async def forever():
            try:
                await asyncio.sleep(60)
            finally:
                log.append(is_grad_enabled())

        async def main():
            task = asyncio.create_task(forever())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return is_grad_enabled()

        assert asyncio.run(main())
        assert log == [False]

    def test_asynchronous_generator(self):
        log = []

        @no_grad()
        async def numbers():
            try:
                for i in range(2):
                    await asyncio.sleep(0)
                    try:
                        log.append((yield i, is_grad_enabled()))
                    except KeyError:
                        yield "caught", is_grad_enabled()
            finally:
                await asyncio.sleep(0)
                log.append(is_grad_enabled())

        async def main():
            async for _, recording in numbers():
                assert not recording
                assert is_grad_enabled()
            steps = numbers()
            assert await steps.asend(None) == (0, False)
            assert await steps.asend("sent") == (1, False)
            assert await steps.athrow(KeyError()) == ("caught", False)
            await steps.aclose()
            with pytest.raises(StopAsyncIteration):
                await steps.asend(None)
            assert is_grad_enabled()

        assert inspect.isasyncgenfunction(numbers)
        asyncio.run(main())
        assert log == [None, None, False, "sent", False]

    def test_a_with_block_does_not_reach_other_tasks(self):
        async def without():
            with no_grad():
                await asyncio.sleep(0.002)

        async def main():
            tasks = [asyncio.create_task(without()) for _ in range(2)]
            await asyncio.sleep(0.001)
            inside = is_grad_enabled()
            await asyncio.gather(*tasks)
            return inside, is_grad_enabled()

        assert asyncio.run(main()) == (True, True)


class TestNoGradElsewhere:
    @pytest.mark.parametrize("what", [int, classmethod(lambda cls: None), property(len), 3])
    def test_decorates_functions_only(self, what):
        with pytest.raises(TypeError, match=r"no_grad\(\) decorates functions; got"):
            no_grad()(what)

    def test_one_instance_entered_twice_and_by_two_threads(self):
        shared = no_grad()
        entered, leave = threading.Event(), threading.Event()
        after = []

        def other():
            with no_grad(), shared:
                entered.set()
                leave.wait(10)
            after.append(is_grad_enabled())

        with shared:
            thread = threading.Thread(target=other)
            thread.start()
            entered.wait(10)
            with shared:
                pass
            assert not is_grad_enabled()
        assert is_grad_enabled()
        leave.set()
        thread.join()
        assert after == [True]

    def test_recursive_function(self):
        @no_grad()
        def depth(n):
            assert not is_grad_enabled()
            return n and depth(n - 1)

        assert depth(3) == 0
        assert is_grad_enabled()


def test_check_finite_on_a_generator():
    @debug.check_finite()
    def logs():
        yield 1
        yield Tensor([-1.0]).log()

    steps = logs()
    next(steps)
    assert np.isnan(Tensor([-1.0]).log().item())  # not checked between the steps
    with pytest.raises(NonFiniteError):
        next(steps)
