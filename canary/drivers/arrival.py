"""When bytes arrived: a trio stream that dates each read by the kernel's clock where it can.

The kernel notes the time at which a segment comes in (SO_TIMESTAMPNS), long before our task is scheduled to read it,
so a receipt dated by it does not grow with our own load. The stream knows bytes and clocks; frames and heartbeats it
does not know. It lies below TLS: the records it reads are still encrypted then, and their arrival is what counts.
"""

import errno
import socket
import struct
import sys
import time
from dataclasses import dataclass

import trio

from canary.events import Stamp

SO_TIMESTAMPNS = 35
"""Number of the option and of its control message in Linux; the socket module has no name for it."""
TIMESPEC = struct.Struct("@ll")
CONTROL_BYTES = socket.CMSG_SPACE(TIMESPEC.size) if sys.platform == "linux" else 0
READ_BYTES = 65536
"""What trio's own SocketStream asks for."""
AGE_NS_MAX = 10 * 1_000_000_000
"""A stamp older than this is a stepped clock, not a wait: bytes that our loop left lying for longer than a session's
own liveness deadline are not worth a date."""
STEP_NS_MAX = 50 * 1_000_000
"""Between two reads of a stream the wall clock may drift from ours by less: what is slewed moves a thousandth of that,
and a stamp that is off by as much would not move a verdict."""
TLS_HEADER_BYTES = 5

Control = list[tuple[int, int, bytes]]
"""Messages that the kernel hands over beside the bytes."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """When the bytes of one read arrived, on the clock of `trio.current_time()`."""

    read: int
    """Number of the read: frames with the same number came in together."""
    at: float
    stamp: Stamp


class ArrivalStream(trio.abc.HalfCloseableStream):
    """Passes bytes on and dates every read in `arrival`.

    A stream without a kernel socket (in memory, or on a platform without such stamps) is dated when the read returns,
    and so are the first reads after a machine's first socket asks for stamps: the kernel turns them on a little later.
    A read over which the wall clock was set is dated when it returns too: the stamp may be of the old time.
    With `tls`, a read that ended several TLS records is COALESCED: the frames in it come out one by one above us.
    Without, whoever takes frames off the stream sees for himself which of them share a read.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream, tls: bool = False) -> None:
        self._stream = stream
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) and _stamped(stream) else None
        self._records = _TlsRecords() if tls else None
        self._offset_ns = time.time_ns() - round(trio.current_time() * 1e9)
        self.arrival = Arrival(0, trio.current_time(), Stamp.USER)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._socket is None:
            data, at, stamp = (
                bytes(await self._stream.receive_some(max_bytes)),
                trio.current_time(),
                Stamp.USER,
            )
        else:
            data, control = await _receive(self._socket, max_bytes or READ_BYTES)
            at, stamp = self._dated(control, trio.current_time(), time.time_ns())
        if self._records is not None and self._records.feed(data) > 1 and stamp is Stamp.KERNEL:
            stamp = Stamp.COALESCED
        self.arrival = Arrival(self.arrival.read + 1, at, stamp)
        return data

    def _dated(self, control: Control, now_at: float, now_ns: int) -> tuple[float, Stamp]:
        was_ns, self._offset_ns = self._offset_ns, now_ns - round(now_at * 1e9)
        if abs(self._offset_ns - was_ns) > STEP_NS_MAX:
            return now_at, Stamp.USER
        return date(control, now_at, now_ns)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


def _stamped(stream: trio.SocketStream) -> bool:
    if sys.platform != "linux":
        return False
    try:
        stream.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    return True


async def _receive(sock: trio.socket.SocketType, max_bytes: int) -> tuple[bytes, Control]:
    """As SocketStream.receive_some, with what the kernel says beside. Raises what a trio stream raises."""
    try:
        data, control, _flags, _address = await sock.recvmsg(max_bytes, CONTROL_BYTES)
    except OSError as error:
        if error.errno in (errno.EBADF, errno.ENOTSOCK):
            raise trio.ClosedResourceError("this stream was closed") from None
        raise trio.BrokenResourceError(f"reading failed: {error}") from error
    return data, control


def date(control: Control, now_at: float, now_ns: int) -> tuple[float, Stamp]:
    """Turn the kernel's stamp, which is on the wall clock, into a time on the clock of `now_at`.

    `now_at` and `now_ns` are both clocks read at the same moment. Without a plausible stamp (none, from the future,
    or older than AGE_NS_MAX: somebody set the wall clock) the answer is `now_at`, by the user's clock.
    """
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS and len(payload) == TIMESPEC.size:
            seconds, nanoseconds = TIMESPEC.unpack(payload)
            age_ns = now_ns - (seconds * 1_000_000_000 + nanoseconds)
            if 0 <= age_ns <= AGE_NS_MAX:
                return now_at - age_ns / 1e9, Stamp.KERNEL
    return now_at, Stamp.USER


class _TlsRecords:
    """Counts the TLS records that end in each read. Only lengths are read, which stand in clear."""

    def __init__(self) -> None:
        self._header = b""
        self._body_left = 0

    def feed(self, data: bytes) -> int:
        ended, position = 0, 0
        while position < len(data):
            if self._body_left:
                step = min(self._body_left, len(data) - position)
                self._body_left -= step
                ended += not self._body_left
            else:
                step = min(TLS_HEADER_BYTES - len(self._header), len(data) - position)
                self._header += data[position : position + step]
                if len(self._header) == TLS_HEADER_BYTES:
                    self._body_left = int.from_bytes(self._header[3:])
                    self._header = b""
            position += step
        return ended
