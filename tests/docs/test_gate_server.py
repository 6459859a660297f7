"""The server of the how-to runs as it stands there: one answer for whoever asks, by body or by status."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.proving import ROOT, wait_until

GATE = """\
#!/bin/sh
echo "$@" >> {log}
sleep 0.3
test "$3" = broken && exit 70
echo '{{"answer": "'$3'"}}'
case $3 in good) exit 0;; bad) exit 1;; *) exit 3;; esac
"""
"""Answers by the candidate's name, and keeps count."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    gate = tmp_path / "canary"
    gate.write_text(GATE.format(log=tmp_path / "asked"))
    gate.chmod(0o755)
    command = [sys.executable, ROOT / "docs" / "howto" / "gate_server.py", "0", "--shard", "east"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    said = tmp_path / "said"
    with said.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.DEVNULL, env=os.environ | {"PATH": path}
        )
    try:
        yield wait_until(lambda: said.read_text().strip(), within_s=20)
    finally:
        process.kill()
        process.wait()


def ask(url: str, body: bytes | None = None) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, data=body, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_a_web_metric_reads_the_answer_and_a_webhook_the_status(server, tmp_path):
    for build, status in (("good", 200), ("bad", 409), ("other", 503)):
        for body, expected in ((None, 200), (b'{"name": "flagger"}', status)):
            code, said = ask(f"{server}/{build}", body)
            assert (code, json.loads(said)["answer"]) == (expected, build)
    assert "gate --candidate good --json --shard east" in (tmp_path / "asked").read_text()


def test_a_gate_that_broke_is_inconclusive(server):
    assert ask(f"{server}/broken") == (200, b'{"answer": "inconclusive"}\n')
    assert ask(f"{server}/broken", b"")[0] == 503


def test_two_that_ask_for_one_candidate_share_a_gate(server, tmp_path):
    with ThreadPoolExecutor(4) as askers:
        answers = list(askers.map(lambda _: ask(f"{server}/good"), range(4)))
    assert {code for code, _ in answers} == {200}
    assert len((tmp_path / "asked").read_text().splitlines()) == 1


def test_a_path_that_is_no_build_runs_nothing(server, tmp_path):
    assert ask(f"{server}/--shard")[0] == 404
    assert ask(f"{server}/")[0] == 404
    assert not (tmp_path / "asked").exists()
