"""The command `canary` as a person meets it: what it takes, what it says, and its exit codes. Real processes, real sockets."""

import http.server
import json
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from click.testing import CliRunner

from canary.cli import cli
from canary.cli.run import _Gist
from canary.events import Blind, Event, Verdict
from canary.outputs.journal import open_journal
from canary.outputs.summary import Health
from tests.outputs.records import closed, failed, heartbeat, settled
from tests.proving import Cluster, Done, canary, canary_running, cluster_running

NET = 70
SECRET = "a secret that must never be seen anywhere"
CHECK_WITHIN_S = 8.0

GOOD = """\
fleet = "test"

[heartbeat]
period = "1s"

[regions.us-east]
watches = ["us-east"]

[shards.us-east]
api_key = "key"
secret_env = "CHAT_SECRET"

[shards.us-east.nodes]
us-east-1 = "http://127.0.0.1:1"
us-east-2 = "http://127.0.0.1:1"
"""


@pytest.fixture
def regions(tmp_path: Path) -> Any:
    """Writes GOOD, changed, and gives its path."""

    def write(*changes: tuple[str, str], text: str = GOOD) -> Path:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "regions.toml"
        path.write_text(text)
        return path

    return write


def on(path: Path, *words: object, **options: Any) -> Done:
    """`canary WORDS` with this configuration, and SECRET where it reads it."""
    return canary(*words, "--config", path, secret=SECRET, CHAT_SECRET=SECRET, **options)


def flat(text: str) -> str:
    """Without the line ends of a table made for a terminal."""
    return " ".join(text.split())


# --- what stands in regions.toml -----------------------------------------------------------------------------------


def test_a_good_configuration_shows_the_plan_and_its_load(regions):
    done = on(regions(), "config")
    assert done.code == 0
    assert done.stderr == ""
    # 2 nodes and one region: 2 canaries, 4 routes; each client hears both senders; 60 sends a minute are the limit
    assert "us-east 2 2 2 4 2 of 5 60 of 60" in flat(done.stdout)


def test_a_good_configuration_shows_what_it_promises_before_anything_runs(regions):
    shown = flat(on(regions(), "config").stdout)
    # silence of one route: half a period, two more heartbeats, the pause allowance, and silence that weighs
    assert "all 1.9 / 2.4 5.9 / 6.4" in shown
    assert all(f"{share} " in shown for share in ("66%", "20%", "5%", "1%"))
    assert "no more than one PAGE in 30 d and one SUSPECT in 1 h" in shown
    assert "No control target is named" in shown


def test_a_control_target_is_named_before_anything_runs(regions):
    place = regions(text=GOOD + '\n[agent]\ncontrol = ["https://example.com"]\n')
    assert "only while https://example.com can be reached" in flat(on(place, "config").stdout)
    assert on(place, "config", "--json").json["control"] == ["https://example.com"]


def test_the_plan_is_json_for_machines(regions):
    plan = on(regions(), "config", "--json").json
    members = [one["name"] for one in plan["canaries"] if one["member"]]
    assert members == ["us-east-at-us-east-1", "us-east-at-us-east-2"]
    assert len(plan["routes"]) == 4
    assert plan["loads"][0]["live_per_client_per_s"] == 2
    assert plan["false_alarms"] == {"suspect_every_s": 3600, "page_every_s": 30 * 86400}
    (promise,) = plan["promises"]
    assert (promise["shards"], promise["routes"], len(promise["flagged"])) == (["us-east"], 4, 15)


EVERY_MISTAKE = """\
fleet = "test"

[heartbeat]
periode = "1s"
deadline = "5"

[regions.us-east]
watches = ["us-east", "us-eats", "us-eats", "other"]

[shards.us-east]
api_key = "key"
[shards.us-east.nodes]
us-east-1 = "127.0.0.1:1"

[shards.other]
region = "mars"
api_key = "key"
secret_env = "NOT_SET_HERE"
[shards.other.nodes]
us-east-1 = "http://127.0.0.1:1"

[shards.third]
region = "us-east"
api_key = 5
secret_file = "/nowhere/secret"
[shards.third.nodes]
"""


def test_all_mistakes_are_told_at_once_each_with_its_line_and_key(regions):
    path = regions(text=EVERY_MISTAKE)
    done = on(path, "config")
    assert done.code == 2
    assert done.stdout == ""
    assert [line.removeprefix(f"{path}: line ").split(": ")[:2] for line in done.complaints] == [
        ["4", "heartbeat.periode"],
        ["5", "heartbeat.deadline"],
        ["8", "regions.us-east.watches"],
        ["8", "regions.us-east.watches"],
        ["10", "shards.us-east.secret"],
        ["13", "shards.us-east.nodes.us-east-1"],
        ["16", "shards.other.region"],
        ["18", "shards.other.secret_env"],
        ["20", "shards.other.nodes.us-east-1"],
        ["22", "shards.third"],
        ["24", "shards.third.api_key"],
        ["25", "shards.third.secret_file"],
        ["26", "shards.third.nodes"],
    ]
    for words in (
        "unknown key; did you mean `period`?",
        "missing secret: give either `secret_env` or `secret_file`",
        "missing secret: the environment variable NOT_SET_HERE is not set",
        "missing secret: cannot read /nowhere/secret: No such file or directory",
        "duplicate name: shard `us-east` has a node of this name",
        '"127.0.0.1:1" is not a URL; write it like "https://chat.example.com"',
        "there is no shard `us-eats`; did you mean `us-east`?",
    ):
        assert words in done.stderr


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(
            ('period = "1s"', 'period = "1s'),
            "line 4: not TOML: Illegal character '\\n' (column 13)",
            id="TOML syntax",
        ),
        pytest.param(
            ("[regions.us-east]", "[shards.us-east]\n[regions.us-east]"),
            "line 10: not TOML: Cannot declare ('shards', 'us-east') twice (column 16)",
            id="duplicate shard",
        ),
        pytest.param(
            ('period = "1s"', 'period = "250ms"'),
            "2 senders / 0.25 s = 8 live messages/s to every client; the limit is 5. A period of 0.4s keeps it",
            id="a plan that breaks a limit",
        ),
    ],
)
def test_a_file_that_is_no_plan_is_refused_with_the_reason(regions, change, complaint):
    done = on(regions(change), "config")
    assert done.code == 2
    assert done.stdout == ""
    assert complaint in done.complaints[0]


def test_a_secret_in_the_file_itself_is_refused_and_not_repeated(regions):
    done = on(regions(('secret_env = "CHAT_SECRET"', f'secret = "{SECRET}"')), "config")
    assert done.code == 2
    assert "a secret does not stand in this file; use `secret_env` or `secret_file`" in done.stderr


def test_a_configuration_that_is_not_there_is_one_line(tmp_path):
    done = on(tmp_path / "none.toml", "check")
    assert done.code == 2
    assert done.complaints == [
        f"{tmp_path}/none.toml: cannot read {tmp_path}/none.toml: No such file or directory; "
        "give another with --config"
    ]


# --- what is given on the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["check", "mars"], "there is no region `mars`; there are us-east"),
        (["check", "--shard", "mars"], "there is no shard `mars`; there are us-east"),
        (["run", "--for", "5 minutes"], '"5 minutes" is not a duration; write it like "500ms", "5s", "10m"'),
        (["rehearse", "2020-12-10"], "no scenario `2020-12-10`; there are 2020-12-09, 2020-12-09-gated"),
        (["rehearse", "2020-12-09", "--pace", "0"], "0.0 is not in the range x>=0.1"),
        (["rehearse"], "give a SCENARIO, or --all for the catalogue of faults"),
        (["rehearse", "2020-12-09", "--all"], "give either a SCENARIO or --all or --only"),
        (["rehearse", "--all", "--otlp", "http://x"], "the catalogue takes no --otlp"),
        (["rehearse", "--only", "late"], "the catalogue has no fault `late`; near it are late-8s"),
        (["rehearse", "--all", "--repeat", "0"], "0 is not in the range x>=1"),
        (["rehearse", "2020-12-09", "--keep", "."], ". is there already; give a new directory"),
    ],
    ids=lambda given: " ".join(given[:2]) if isinstance(given, list) else "",
)
def test_a_mistake_on_the_command_line_names_what_there_is(regions, words, complaint):
    done = on(regions(), *words)
    assert done.code == 2
    assert complaint in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('do = "end"', 'do = "explode"', "there is no step `explode`; there are deploy, rollback"),
        ("nodes = 1", "nodes = ", "Invalid value (at line 7, column 9)"),
    ],
)
def test_a_mistake_in_a_scenario_is_one_line(regions, tmp_path, old, new, complaint):
    text = Path("scenarios/2020-12-09-one-node.toml").read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new, 1))
    done = on(regions(), "rehearse", tmp_path / "mine.toml")
    assert done.code == 2
    (line,) = done.complaints
    assert line.startswith("scenario mine: ")
    assert complaint in line


@pytest.mark.parametrize("command", ["check", "run", "rehearse", "incidents", "trace", "config"])
def test_the_help_of_each_command_shows_an_example_and_the_exit_codes(command):
    help_text = CliRunner().invoke(cli, [command, "--help"]).output
    before_options = help_text[: help_text.index("Options:")]
    assert f"\n  canary {command}" in before_options
    assert "Exit 0" in flat(before_options)
    assert " 2 " in flat(before_options)


# --- shards that are not there, or are something else ----------------------------------------------------------------


class Plain(http.server.BaseHTTPRequestHandler):
    """A web server that knows nothing of chat."""

    protocol_version = "HTTP/1.1"
    status = 404

    def do_POST(self) -> None:
        body = b"<html>a page</html>"
        self.send_response(self.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Friendly(Plain):
    """Says 200 to everything."""

    status = 200


class Busy(Plain):
    """A proxy whose chat behind it is down."""

    status = 503


class Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that went away, or never spoke TLS."""


@contextmanager
def web_server(handler: type[Plain], tls: bool = False) -> Iterator[int]:
    with Quiet(("127.0.0.1", 0), handler) as server:
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextmanager
def not_http() -> Iterator[int]:
    """Greets as an SSH server does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                    connection.recv(65536)
                    connection.sendall(b"Invalid SSH identification string.\r\n")
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass  # a reset would overtake what was said

        threading.Thread(target=greet, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


NOT_OURS = "does not speak Stream Chat's protocol"


@pytest.mark.parametrize(
    ("server", "scheme", "complaint"),
    [
        pytest.param(partial(web_server, Plain), "http", f"{NOT_OURS}: HTTP 404", id="404"),
        pytest.param(partial(web_server, Friendly), "http", f"{NOT_OURS}: HTTP 200", id="200"),
        pytest.param(partial(web_server, Plain), "https", "does not speak TLS", id="no TLS"),
        pytest.param(partial(web_server, Plain, tls=True), "https", "its certificate fails", id="own CA"),
    ],
)
def test_a_shard_that_speaks_another_protocol_is_one_line(regions, server, scheme, complaint):
    with server() as port:
        door = f"{scheme}://127.0.0.1:{port}"
        done = on(regions(text=GOOD.replace("http://127.0.0.1:1", door)), "check")
    assert done.code == 2
    (line,) = done.complaints
    assert door in line
    assert complaint in line


def test_a_run_ends_too_when_the_shard_speaks_another_protocol(regions, tmp_path):
    with web_server(Plain) as port:
        path = regions(text=GOOD.replace("127.0.0.1:1", f"127.0.0.1:{port}"))
        done = on(path, "run", "--for", "20s", "--journal", tmp_path / "journal.sqlite")
    assert done.code == 2
    (line,) = done.complaints
    assert NOT_OURS in line


def test_a_check_of_nothing_is_inconclusive_and_says_why(regions):
    done = on(regions(), "check")
    assert done.code == 3
    assert "INCONCLUSIVE us-east-at-us-east-1-check has no session (and 3 more)" in flat(done.stdout)
    assert "no answer from http://127.0.0.1:1/users" in flat(done.stdout)


@pytest.mark.parametrize(
    ("server", "complaint"),
    [
        pytest.param(partial(web_server, Busy), "refused us: HTTP 503", id="503"),
        pytest.param(not_http, "no answer from", id="SSH"),
    ],
)
def test_a_shard_that_may_yet_come_is_waited_for_and_then_inconclusive(regions, server, complaint):
    """What drops a connection without an answer cannot be told from a shard that is starting."""
    with server() as port:
        done = on(regions(text=GOOD.replace("127.0.0.1:1", f"127.0.0.1:{port}")), "check")
    assert done.code == 3
    assert complaint in flat(done.stdout)
    assert f"127.0.0.1:{port}" in done.stdout


def test_a_rehearsal_without_room_for_a_cluster_is_one_line(regions, tmp_path):
    with socket.create_server((f"127.{NET + 2}.0.1", 8800)):
        words = ["rehearse", "2020-12-09-one-node", "--net", NET + 1, "--keep", tmp_path / "kept"]
        done = on(regions(), *words)
    assert done.code == 3
    assert f"127.{NET + 2}.0.1:8800 is in use" in done.complaints[-1]
    assert len(done.complaints) == 2  # that it starts a cluster, and that it could not


# --- journals --------------------------------------------------------------------------------------------------------


def run_with_journal(path: Path, journal: Path) -> Done:
    return on(path, "run", "--for", "1s", "--journal", journal)


def test_a_journal_in_use_is_told_with_the_process_that_has_it(regions, tmp_path):
    journal = tmp_path / "journal.sqlite"
    with open_journal(journal, "test", 0.0):
        done = run_with_journal(regions(), journal)
    assert done.code == 2
    assert done.complaints == [
        f"another agent (process {os.getpid()}) writes the journal {journal}; "
        "stop it, or give this one a journal of its own with --journal"
    ]


def test_a_file_that_is_no_journal_is_left_alone(regions, tmp_path):
    journal = tmp_path / "letter.txt"
    journal.write_text("Dear Sir or Madam, this is not a database, however long it may be. " * 99)
    before = journal.read_bytes()
    for done in (run_with_journal(regions(), journal), canary("incidents", "--journal", journal)):
        assert done.code == 2
        (line,) = done.complaints
        assert f"{journal}" in line
        assert "not a" in line
    assert journal.read_bytes() == before


def test_a_journal_that_cannot_be_written_is_one_line(regions, tmp_path):
    (tmp_path / "file").write_text("in the way of a directory")
    journal = tmp_path / "file" / "journal.sqlite"
    done = run_with_journal(regions(), journal)
    assert done.code == 2
    assert done.complaints == [f"cannot write the journal {journal}: File exists"]


def test_incidents_without_a_journal_say_who_writes_one(tmp_path):
    done = canary("incidents", cwd=tmp_path)
    assert done.code == 2
    assert done.complaints == ["there is no journal at canary.sqlite; `canary run` writes one"]


# --- one heartbeat -----------------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path):
    """A delivered heartbeat, a failed one, and another delivered one."""
    path = tmp_path / "canary.sqlite"
    with open_journal(path, "test", 0.0) as journal:
        journal.append([closed(heartbeat(1)), failed(heartbeat(2)), closed(heartbeat(3))])
    return path


def test_the_last_failed_heartbeat_is_shown_span_by_span(journal):
    done = canary("trace", "--last-failed", "--journal", journal)
    assert done.code == 0, done.stderr
    assert heartbeat(2).id in done.stdout
    assert "UNDELIVERED" in done.stdout
    assert "audit replayed" in done.stdout


def test_a_heartbeat_is_shown_by_its_id_its_trace_or_as_the_last(journal):
    for words in ([heartbeat(2).id], [heartbeat(2).trace_id], ["--last-failed"]):
        done = canary("trace", *words, "--json", "--journal", journal)
        assert (done.json["heartbeat"]["seq"], done.json["trace_id"]) == (2, heartbeat(2).trace_id)
    assert canary("trace", "--json", "--journal", journal).json["heartbeat"]["seq"] == 3


def test_a_heartbeat_that_is_not_there_is_one_line(journal, tmp_path):
    done = canary("trace", "e1.nobody.7", "--journal", journal)
    assert done.code == 2
    (line,) = done.complaints
    assert "no heartbeat e1.nobody.7" in line
    assert canary("trace", "--last-failed", "x", "--journal", journal).code == 2
    assert canary("trace", cwd=tmp_path / "..").code == 2


# --- a real shard ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One region of three nodes."""
    place = tmp_path_factory.mktemp("cli") / "cluster"
    with cluster_running(place, NET, "--regions", "us-east", "--nodes", 3) as cluster:
        yield cluster


def at(cluster: Cluster, path: Path, *words: object, **options: Any) -> Done:
    return canary(*words, "--config", path, secret=cluster.secret, **options)


def test_a_check_of_a_healthy_shard_is_quick_and_green(cluster):
    done = at(cluster, cluster.config(), "check", "--json")
    assert done.code == 0
    assert done.json["health"] == "healthy"
    assert done.json["heartbeats"] == done.json["delivered"] == 2 * 9  # two of each sender on nine routes
    assert {(cell["sender_node"], cell["receiver_node"]) for cell in done.json["cells"]} == {
        (f"us-east-{sender}", f"us-east-{receiver}") for sender in (1, 2, 3) for receiver in (1, 2, 3)
    }
    assert done.stderr == ""
    assert done.took_s < CHECK_WITHIN_S


def test_a_check_tells_a_person_in_a_table_and_a_sentence(cluster):
    done = at(cluster, cluster.config(), "check")
    assert done.code == 0
    assert "HEALTHY Every heartbeat arrived in time on every route (18 of 18)." in flat(done.stdout)
    rows = [line for line in done.stdout.splitlines() if line.startswith("us-east-")]
    assert [row.count(" ms") for row in rows] == [3, 3, 3]


def test_wrong_credentials_are_one_line_that_says_which(cluster, tmp_path):
    wrong = tmp_path / "secret"
    wrong.write_text(SECRET)
    done = at(cluster, cluster.config(secret_file=wrong), "check")
    assert done.code == 2
    (line,) = done.complaints
    assert "the secret of shard `us-east` is not the one of this `api_key`" in line
    assert SECRET not in line


def test_a_wrong_key_is_one_line_that_says_so(cluster, tmp_path):
    path = cluster.config(api_key="another")
    done = at(cluster, path, "run", "--for", "20s", "--journal", tmp_path / "journal.sqlite")
    assert done.code == 2
    (line,) = done.complaints
    assert "the shard does not know this `api_key`: check `api_key` of shard `us-east`" in line


@pytest.mark.parametrize(
    ("hours", "complaint"),
    [
        pytest.param(-2, "this machine's clock lags by an hour or more: set it", id="expired"),
        pytest.param(2, "this machine's clock runs ahead: set it", id="not yet valid"),
    ],
)
def test_an_expired_token_is_one_line_that_blames_the_clock(cluster, tmp_path, hours, complaint):
    """Tokens are minted when they are needed, so only a clock that is wrong makes an expired one."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import time\nreal = time.time\ntime.time = lambda: real() + {hours * 3600}\n"
    )
    done = at(cluster, cluster.config(), "check", PYTHONPATH=str(tmp_path))
    assert done.code == 2
    (line,) = done.complaints
    assert complaint in line


def test_a_check_of_a_shard_with_a_dead_node_fails_and_names_the_canary(cluster):
    path = cluster.config()
    os.kill(cluster.nodes("us-east")["us-east-3"]["pid"], signal.SIGKILL)
    try:
        done = at(cluster, path, "check", "--json")
    finally:
        cluster.order("deploy", "--build", "good-1", "--pause", "0s")
    assert done.code == 1
    assert done.json["health"] == "failing"
    assert list(done.json["troubles"]) == ["us-east-at-us-east-3-check", "us-east-outside-us-east-3-check"]
    assert "us-east-at-us-east-3-check has no session" in done.json["diagnosis"]
    assert done.json["delivered"] >= 2 * 4  # among the nodes that live


def test_a_second_signal_ends_a_run_at_once(regions, tmp_path):
    """The first settles what is open; who cannot wait says so again."""
    path = regions()
    words = ["run", "--json", "--config", path, "--journal", tmp_path / "journal.sqlite"]
    os.environ["CHAT_SECRET"] = SECRET
    with canary_running(*words, out=tmp_path / "run.jsonl") as running:
        running.wait_event("detached")
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert running.end(signal.SIGINT, within_s=5) == 0
    assert [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]


# --- the gate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--exclude-loss", "0.2%"), "0.002 cannot be told from the tolerated loss of 0.001"),
        (("--exclude-loss", "some"), '"some" is not a share; write it like "5%" or "0.05"'),
        (("--exclude-loss", "100%"), "it must lie between 0 and 100%"),
        (("--timeout", "soon"), '"soon" is not a duration'),
        (("--shard", "mars"), "there is no shard `mars`"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(regions, words, complaint):
    done = on(regions(), "gate", "--candidate", "x", *words)
    assert done.code == 2
    assert complaint in flat(done.stderr)


def test_a_gate_that_reaches_nothing_is_inconclusive_when_its_time_is_over(regions, tmp_path):
    report = tmp_path / "gate.xml"
    done = on(regions(), "gate", "--candidate", "x", "--timeout", "2s", "--json", "--junit", report)
    assert done.code == 3
    assert (done.json["answer"], done.json["reason"], done.json["exit"]) == (
        "inconclusive",
        "no-candidate",
        3,
    )
    assert done.json["took_s"] == pytest.approx(2, abs=1)
    assert 'error type="no-candidate"' in report.read_text()


def test_a_gate_promotes_a_good_build_on_the_real_cluster(cluster, tmp_path):
    """A fifth is soon excluded."""
    report = tmp_path / "gate.xml"
    words = ["gate", "--candidate", "good-1", "--exclude-loss", "20%", "--junit", report, "--json"]
    done = at(cluster, cluster.config(), *words)
    assert done.code == 0
    assert (done.json["answer"], done.json["reason"]) == ("promote", "loss-excluded")
    assert {(path["stratum"]["accepted"], path["stratum"]["same_node"]) for path in done.json["strata"]} == {
        ("good-1", True),
        ("good-1", False),
    }
    assert 'failures="0" errors="0" skipped="0"' in report.read_text()


def test_an_answer_stands_though_its_report_cannot_be_written(regions):
    done = on(regions(), "gate", "--candidate", "x", "--timeout", "1s", "--junit", "/nowhere/gate.xml")
    assert done.code == 3
    assert done.complaints == ["cannot write /nowhere/gate.xml: No such file or directory"]
    assert done.stdout.splitlines()[-1].startswith("INCONCLUSIVE: no heartbeat passed a node that runs x")


# --- what a scheduled run comes to --------------------------------------------------------------------------------------

DELIVERED = settled(heartbeat(), verdict=Verdict.DELIVERED)


@pytest.mark.parametrize(
    ("events", "health"),
    [
        ([], Health.INCONCLUSIVE),
        ([DELIVERED], Health.HEALTHY),
        ([DELIVERED, Blind(70.0, 10.0, "no network", over=False)], Health.INCONCLUSIVE),
        (
            [
                DELIVERED,
                Blind(70.0, 10.0, "no network", over=False),
                Blind(90.0, 10.0, "no network", over=True),
            ],
            Health.HEALTHY,
        ),
    ],
)
async def test_a_run_that_ends_blind_cannot_call_anything_healthy(events: list[Event], health: Health):
    send, receive = trio.open_memory_channel[Event](10)
    for event in events:
        send.send_nowait(event)
    send.close()
    gist = _Gist()
    await gist.read(receive)
    assert gist.health is health
