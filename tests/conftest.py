"""Two workers share the tests: those that start clusters and commands run on one, the others beside them."""

from pathlib import Path

import pytest

PROVING = ("cluster", "e2e", "sdk", "test_cli.py", "test_stream_on_cluster.py")
"""Places whose tests use fixed loopback addresses, or wait for processes more than they compute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not set(PROVING).isdisjoint(Path(item.path).parts):
            item.add_marker(pytest.mark.xdist_group("proving"))
