"""How two workers share the tests: a file at a time, and all that start clusters on the same addresses as one.

Property tests draw the same examples each time, so that a change alone decides whether they pass. To look for more:
`pytest --hypothesis-profile=default`.
"""

from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

TOGETHER = ("tests/cluster/", "tests/e2e/", "tests/sdk/")
"""Folders whose files share clusters, and with them loopback addresses that must not be taken twice at a time."""


class ByPlace(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        folder = next((folder for folder in TOGETHER if nodeid.startswith(folder)), None)
        return folder or nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByPlace:
    return ByPlace(config, log)
