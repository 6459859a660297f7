"""How two workers share the tests: a file at a time, and all that start clusters on the same addresses as one."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/cluster/", "tests/e2e/", "tests/sdk/")
"""Folders whose files share clusters, and with them loopback addresses that must not be taken twice at a time."""


class ByPlace(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        folder = next((folder for folder in TOGETHER if nodeid.startswith(folder)), None)
        return folder or nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByPlace:
    return ByPlace(config, log)
