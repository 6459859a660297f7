"""Names and addresses."""

import pytest

from cluster.addresses import Layout, LayoutError


def test_regions_nodes_and_relays_are_numbered_as_documented():
    layout = Layout(("us-east", "singapore"), 3)
    node = layout.shard("singapore")[1]
    assert (node.name, node.url, node.nats_url) == (
        "singapore-2",
        "http://127.2.0.2:8800",
        "nats://127.2.0.2:4222",
    )
    assert layout.relay_host("us-east", node) == "127.2.1.2"
    assert list(layout.links()) == [("us-east", "singapore"), ("singapore", "us-east")]


def test_a_shifted_layout_shares_no_address_with_the_first():
    here, there = Layout(("a", "b"), 3), Layout(("a", "b"), 3, net=2)
    assert not set(here.listeners()) & set(there.listeners())


def test_no_two_listeners_share_an_address():
    listeners = list(Layout(("a", "b", "c"), 5).listeners())
    assert len(set(listeners)) == len(listeners) == 3 * 5 * 3 + 6 * 5


@pytest.mark.parametrize(("nodes", "replicas"), [(1, 1), (2, 1), (3, 3), (5, 3)])
def test_three_replicas_where_there_are_three_nodes(nodes, replicas):
    assert Layout(("a",), nodes).replicas == replicas


@pytest.mark.parametrize("regions", [(), ("",), ("A",), ("a.b",), ("1a",), ("a", "a"), ("a" * 40,)])
def test_bad_regions_are_refused(regions):
    with pytest.raises(LayoutError):
        Layout(regions, 3)
