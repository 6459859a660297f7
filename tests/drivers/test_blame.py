"""Errors of the operating system, raw and as trio, httpcore and httpx hand them on, and whose fault they are."""

import errno
import os
import resource
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
import trio

from canary.drivers import Part
from canary.drivers.blame import own_fault


def oserror(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def as_trio_raises(*errors: OSError) -> OSError:
    wrapped = OSError("all attempts to connect failed")
    wrapped.__cause__ = ExceptionGroup("all attempts to connect failed", errors)
    return wrapped


def as_httpx_raises(error: OSError) -> httpx.ConnectError:
    """httpcore raises its own error out of the handling of another, and says `from None` later."""
    outer = httpx.ConnectError("all attempts to connect failed")
    outer.__cause__ = RuntimeError("httpcore's")
    outer.__cause__.__context__ = as_trio_raises(error)
    return outer


@pytest.mark.parametrize(
    ("error", "part", "said"),
    [
        (oserror(errno.EMFILE), Part.MACHINE, "Too many open files"),
        (oserror(errno.EADDRNOTAVAIL), Part.MACHINE, "Cannot assign requested address"),
        (oserror(errno.ENETUNREACH), Part.ROUTE, "Network is unreachable"),
        (oserror(errno.EHOSTUNREACH), Part.HOST, "No route to host"),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), Part.RESOLVER, "names do not resolve (try again)"),
    ],
)
def test_what_failed_on_our_side_is_told_by_its_part(error: OSError, part: Part, said: str):
    for raised in (error, as_trio_raises(error), as_httpx_raises(error)):
        fault = own_fault(raised)
        assert fault is not None
        assert fault.part is part
        assert str(fault) == f"this machine cannot connect: {said}"


@pytest.mark.parametrize(
    "error",
    [
        None,
        oserror(errno.ECONNREFUSED),
        oserror(errno.ETIMEDOUT),
        TimeoutError("no connection within 3.5 s"),
        socket.gaierror(socket.EAI_NONAME, "no such name"),
        ssl.SSLError(1, "wrong version number"),  # errno.EPERM is 1 as well
        httpx.ReadError("gone"),
        ValueError("else"),
    ],
)
def test_what_the_other_side_may_have_done_is_not_ours(error: BaseException | None):
    assert own_fault(error) is None


def test_a_family_of_addresses_that_we_do_not_speak_is_not_the_cause():
    assert own_fault(as_trio_raises(oserror(errno.ENETUNREACH), oserror(errno.ECONNREFUSED))) is None


def test_of_two_faults_of_ours_the_surer_one_is_told():
    fault = own_fault(as_trio_raises(oserror(errno.ENETUNREACH), oserror(errno.EMFILE)))
    assert fault is not None
    assert fault.part is Part.MACHINE


@contextmanager
def no_descriptors() -> Iterator[None]:
    """No file can be opened any more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def by_trio() -> None:
    await trio.open_tcp_stream("127.0.0.1", 9)


async def by_httpx() -> None:
    async with httpx.AsyncClient(verify=False, trust_env=False) as client:
        await client.get("http://127.0.0.1:9/")


@pytest.mark.parametrize("connect", [by_trio, by_httpx])
async def test_the_real_errors_are_recognised(connect: Callable[[], Awaitable[None]]):
    with pytest.raises((OSError, httpx.ConnectError)) as refused:
        await connect()  # which also imports what cannot be imported below
    assert own_fault(refused.value) is None
    with no_descriptors(), pytest.raises((OSError, httpx.ConnectError)) as limited:
        await connect()
    fault = own_fault(limited.value)
    assert fault is not None
    assert fault.part is Part.MACHINE
