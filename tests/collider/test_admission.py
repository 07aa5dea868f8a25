"""Groups that take turns."""

from __future__ import annotations

import asyncio

import pytest

from gcpo.collider.admission import Admission


async def visit(admission: Admission, sizes: list[int], log: list[tuple[str, int]]) -> None:
    """Groups of these sizes ask one after another; each stays for a few turns of the loop."""

    async def group(number: int, size: int) -> None:
        async with admission(size):
            log.append(("in", number))
            for _ in range(20):
                await asyncio.sleep(0)
            log.append(("out", number))

    await asyncio.gather(*(group(number, size) for number, size in enumerate(sizes)))


@pytest.mark.parametrize(
    ("limit", "sizes", "together"),
    [
        (None, [5, 5, 5], 15),
        (10, [5, 5, 5], 10),
        (10, [6, 6, 4, 4], 10),
        (10, [3, 25, 3], 25),  # more than the limit: alone
        (4, [5, 5], 5),
    ],
)
def test_no_more_inside_than_fits(limit: int | None, sizes: list[int], together: int) -> None:
    """In the order of asking, never more tokens than the limit, and everybody gets in."""
    log: list[tuple[str, int]] = []
    asyncio.run(visit(Admission(limit), sizes, log))
    inside: set[int] = set()
    most = 0
    for what, number in log:
        inside = inside | {number} if what == "in" else inside - {number}
        held = sum(sizes[k] for k in inside)
        assert limit is None or held <= limit or len(inside) == 1
        most = max(most, held)
    assert most == together
    assert [number for what, number in log if what == "in"] == list(range(len(sizes)))


def test_a_group_that_fails_or_is_cancelled_leaves() -> None:
    """Neither an error inside nor a cancelled wait keeps the others out."""

    async def play() -> list[str]:
        admission, log = Admission(4), []

        async def fails() -> None:
            async with admission(4):
                await asyncio.sleep(0)
                raise RuntimeError("the server is gone")

        async def waits(name: str) -> None:
            async with admission(4):
                log.append(name)

        first, second, third = (asyncio.create_task(work) for work in (fails(), waits("second"), waits("third")))
        await asyncio.sleep(0)
        second.cancel()
        outcomes = await asyncio.gather(first, second, third, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [RuntimeError, asyncio.CancelledError, type(None)]
        return log

    assert asyncio.run(play()) == ["third"]
