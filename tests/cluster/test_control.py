"""Requests and events over the control socket."""

import asyncio

import pytest

from cluster.control import Unreachable, ask, serve


async def count(request):
    for number in range(request["to"]):
        yield {"number": number}


def answers(directory, request):
    async def go():
        server = await serve(directory, count)
        try:
            return await asyncio.to_thread(lambda: list(ask(directory, request)))
        finally:
            server.close()

    return asyncio.run(go())


def test_a_request_is_answered_with_events(tmp_path):
    assert answers(tmp_path, {"to": 3}) == [{"number": 0}, {"number": 1}, {"number": 2}]


def test_the_directory_may_lie_as_deep_as_it_likes(tmp_path):
    deep = tmp_path.joinpath(*["a-directory-with-a-long-name"] * 6)
    deep.mkdir(parents=True)
    assert len(str(deep)) > 108, "longer than a socket address"
    assert answers(deep, {"to": 1}) == [{"number": 0}]


def test_nobody_there_is_told(tmp_path):
    with pytest.raises(Unreachable, match="no cluster answers"):
        list(ask(tmp_path, {"to": 1}))
