"""An HTTP face for `canary gate`, for rollouts that ask by web request. Standard library only.

    python gate_server.py PORT [OPTION OF canary gate ...]

    GET  /CANDIDATE   runs the gate and answers with its JSON, status 200 whatever it says   (Argo Rollouts, web metric)
    POST /CANDIDATE   the same, with the answer as the status: 200 promote, 409 roll back, 503 hold   (Flagger, webhook)

A request lasts as long as the gate. Two for one candidate at a time share the answer of one run; gates of different candidates
wait for each other, since they would use the same users.
"""

import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATUS = {0: 200, 1: 409}
BUILD = re.compile(r"/([A-Za-z0-9][A-Za-z0-9._+-]*)")


class Gates:
    """The gates under way, by candidate."""

    def __init__(self, options: list[str]) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()
        self._asked: dict[str, tuple[threading.Event, list[tuple[int, bytes]]]] = {}

    def ask(self, candidate: str) -> tuple[int, bytes]:
        """Exit code and JSON."""
        with self._lock:
            first = candidate not in self._asked
            ended, answers = self._asked.setdefault(candidate, (threading.Event(), []))
        if first:
            command = ["canary", "gate", "--candidate", candidate, "--json", *self._options]
            with self._one_at_a_time:
                done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
            answers.append((done.returncode, done.stdout or b'{"answer": "inconclusive"}\n'))
            with self._lock:
                del self._asked[candidate]
            ended.set()
        ended.wait()
        return answers[0]


class Handler(BaseHTTPRequestHandler):
    gates: Gates

    def do_GET(self) -> None:
        self._answer(lambda code: 200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer(lambda code: STATUS.get(code, 503))

    def _answer(self, status) -> None:
        match = BUILD.fullmatch(self.path)
        if match is None:
            self.send_error(404, "the path is the candidate's build")
            return
        code, body = self.gates.ask(match[1])
        self.send_response(status(code))
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    Handler.gates = Gates(sys.argv[2:])
    server = ThreadingHTTPServer(("", int(sys.argv[1])), Handler)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()
