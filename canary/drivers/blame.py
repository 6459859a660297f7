"""Whose fault is it that no connection could be had? Reads errors of the operating system and nothing else."""

import errno
import os
import socket
import ssl

from canary.drivers import OwnFault, Part

PARTS = {
    errno.EMFILE: Part.MACHINE,
    errno.ENFILE: Part.MACHINE,
    errno.ENOMEM: Part.MACHINE,
    errno.ENOBUFS: Part.MACHINE,
    errno.EADDRNOTAVAIL: Part.MACHINE,  # out of local ports
    errno.ENETDOWN: Part.MACHINE,
    errno.EACCES: Part.MACHINE,  # a firewall
    errno.EPERM: Part.MACHINE,
    errno.ENETUNREACH: Part.ROUTE,
    errno.EHOSTUNREACH: Part.HOST,
    socket.EAI_AGAIN: Part.RESOLVER,
    socket.EAI_FAIL: Part.RESOLVER,
}
"""That a host refuses us or says nothing is not here, nor that a name does not exist (EAI_NONAME): those are the world's."""


def own_fault(error: BaseException | None) -> OwnFault | None:
    """The fault of ours at the bottom of a failed connection; None if any address failed for another reason: a host
    may have addresses of a family that this machine does not speak."""
    causes = _causes(error)
    parts = [_part(cause) for cause in causes]
    if not parts or None in parts:
        return None
    part = next(part for part in Part if part in parts)
    cause = causes[parts.index(part)]
    return OwnFault(f"this machine cannot connect: {_text(cause)}", part)


def _part(cause: OSError) -> Part | None:
    """OpenSSL has numbers of its own."""
    return None if isinstance(cause, ssl.SSLError) else PARTS.get(cause.errno or 0)


def _causes(error: BaseException | None) -> list[OSError]:
    """The errors of the operating system, below what httpx, httpcore and trio wrapped round them."""
    if isinstance(error, BaseExceptionGroup):
        return [cause for inner in error.exceptions for cause in _causes(inner)]
    if isinstance(error, OSError) and error.errno is not None:
        return [error]
    return [] if error is None else _causes(error.__cause__ or error.__context__)


def _text(cause: OSError) -> str:
    if isinstance(cause, socket.gaierror):
        return f"names do not resolve ({cause.strerror})"
    return os.strerror(cause.errno or 0)
