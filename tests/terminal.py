"""A command in the foreground of a terminal, as a person has it; and what it has left behind."""

import fcntl
import os
import pty
import re
import signal
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.proving import CANARY, ROOT, wait_until


@dataclass(slots=True)
class Terminal:
    """A terminal of 80 x 24 with a command on it."""

    pid: int
    master: int
    seen: bytearray

    @property
    def text(self) -> str:
        """What was shown, without the cursor's moves and the echo of Ctrl-C."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\^C", "", bytes(self.seen).decode(errors="replace"))

    def press_ctrl_c(self) -> None:
        os.write(self.master, b"\x03")

    def wait_ended(self, within_s: float) -> int:
        def ended() -> tuple[int, int] | None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            return (pid, status) if pid else None

        _, status = wait_until(ended, within_s)
        return os.waitstatus_to_exitcode(status)


@contextmanager
def terminal(*words: object, **environ: str) -> Iterator[Terminal]:
    """`canary WORDS` in the foreground of a new terminal."""
    pid, master = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.chdir(ROOT)
        given = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        os.execve(CANARY, [str(CANARY), *map(str, words)], given | {"TERM": "xterm-256color"} | environ)
    shown = Terminal(pid, master, bytearray())
    threading.Thread(target=_read, args=(shown,), daemon=True).start()
    try:
        yield shown
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it has ended, as it should
        os.close(master)


def _read(shown: Terminal) -> None:
    while True:
        try:
            shown.seen += os.read(shown.master, 65536)
        except OSError:  # the last process with this terminal has ended
            return


def processes_with(mark: str) -> list[str]:
    """Every living process whose environment carries the mark, by its command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes():
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended meanwhile
    return found
