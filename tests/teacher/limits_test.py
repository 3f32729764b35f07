"""Rates and gates, on an event loop of the test's own."""

import asyncio

import pytest

from omniopd_jax.teacher.limits import Gate, RateLimit


def test_rate_is_kept_after_the_burst():
    async def run():
        limit = RateLimit(per_minute=6000, burst_s=0.1)  # 100 a second, 10 at once
        start = asyncio.get_running_loop().time()
        await asyncio.gather(*(limit.take(1) for _ in range(40)))
        return asyncio.get_running_loop().time() - start

    assert asyncio.run(run()) == pytest.approx(0.3, abs=0.15)


def test_what_was_estimated_too_high_is_given_back():
    async def run():
        limit = RateLimit(per_minute=6000, burst_s=1.0)  # 100 a second, 100 at once
        start = asyncio.get_running_loop().time()
        for _ in range(10):
            await limit.take(90)
            limit.give_back(85)
        return asyncio.get_running_loop().time() - start

    assert asyncio.run(run()) < 2.0  # without it: 8 s


def test_amount_larger_than_the_bucket_passes_and_owes():
    async def run():
        limit = RateLimit(per_minute=6000, burst_s=0.01)
        start = asyncio.get_running_loop().time()
        await limit.take(30)
        await limit.take(1)
        return asyncio.get_running_loop().time() - start

    assert 0.2 < asyncio.run(run()) < 1.0


def test_zero_is_no_limit():
    async def run():
        limit = RateLimit(0)
        await limit.take(10**9)

    asyncio.run(asyncio.wait_for(run(), 1.0))


def test_gate_opens_by_one_a_success_and_never_beyond_its_size():
    async def run():
        gate, active, most = Gate(6), 0, []

        async def call():
            nonlocal active
            async with gate:
                active += 1
                most.append(active)
                await asyncio.sleep(0.005)
                active -= 1
            gate.succeeded()

        await asyncio.gather(*(call() for _ in range(40)))
        return most

    most = asyncio.run(run())
    assert max(most[:4]) == 4
    assert max(most) == 6


def test_a_pause_holds_everybody():
    async def run():
        gate, times = Gate(4), []
        loop = asyncio.get_running_loop()
        gate.pause(0.2)
        start = loop.time()

        async def call():
            async with gate:
                times.append(loop.time() - start)

        await asyncio.gather(*(call() for _ in range(3)))
        return times

    assert min(asyncio.run(run())) >= 0.19


def test_cancelled_callers_give_their_turn_away():
    async def run():
        gate = Gate(1)
        order = []

        async def call(name, wait_s):
            async with gate:
                order.append(name)
                await asyncio.sleep(wait_s)

        first = asyncio.create_task(call("first", 0.05))
        second = asyncio.create_task(call("second", 0.0))
        third = asyncio.create_task(call("third", 0.0))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.wait_for(asyncio.gather(first, third), 1.0)
        first, fourth = asyncio.create_task(call("held", 1.0)), asyncio.create_task(call("fourth", 0.0))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait_for(fourth, 1.0)
        return order

    assert asyncio.run(run()) == ["first", "third", "held", "fourth"]
