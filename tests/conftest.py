"""Two workers share the tests: those that start clusters and commands run on one, the others beside them."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

PROVING = (
    "tests/cluster/",
    "tests/e2e/",
    "tests/sdk/",
    "tests/test_cli.py",
    "tests/drivers/test_stream_on_cluster.py",
)
"""Tests with loopback addresses of their own, which therefore must not run twice at a time; and which wait for
processes more than they compute."""


class ByPlace(LoadScopeScheduling):
    """All proving tests are one scope, and so is every other file."""

    def _split_scope(self, nodeid: str) -> str:
        return "proving" if nodeid.startswith(PROVING) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByPlace:
    return ByPlace(config, log)
