"""The command behind `deploy --gate`: its exit code, its words, and its end."""

import asyncio
import os
import time
from pathlib import Path

from cluster.gate import Command


def ask(text: str, output: Path, *, interrupt_after_s: float | None = None, **facts: str) -> int | None:
    async def go() -> int | None:
        interrupted = asyncio.Event()
        if interrupt_after_s is not None:
            asyncio.get_running_loop().call_later(interrupt_after_s, interrupted.set)
        return await Command(text, str(output.parent), os.environ["PATH"]).ask(output, facts, interrupted)

    return asyncio.run(go())


def test_the_exit_code_is_the_answer_and_what_it_says_is_kept(tmp_path):
    output = tmp_path / "said"
    assert ask("echo one; echo two >&2; exit 3", output) == 3
    assert output.read_text() == "one\ntwo\n"


def test_it_runs_in_its_callers_directory_and_is_told_the_facts(tmp_path):
    assert ask('test "$PWD" = "$WHERE"', tmp_path / "said", WHERE=str(tmp_path)) == 0


def test_a_command_that_is_not_there_is_no_consent(tmp_path):
    assert ask("no-such-command-anywhere", tmp_path / "said") == 127


def test_an_interrupted_command_ends_with_all_that_it_started(tmp_path):
    began_at = time.monotonic()
    child = tmp_path / "child"
    text = f"sleep 60 & echo $! > {child}; wait"
    assert ask(text, tmp_path / "said", interrupt_after_s=0.3) is None
    assert time.monotonic() - began_at < 5
    assert not Path(f"/proc/{child.read_text().strip()}").exists() or "Z" in state_of(child)


def state_of(child: Path) -> str:
    return Path(f"/proc/{child.read_text().strip()}/stat").read_text().split()[2]
