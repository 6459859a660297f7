"""A running fleet: one nursery, one bounded channel, one owner of the watch.

Senders, receivers and auditors tell facts to the channel; the owner alone feeds them to the watch, hands every event on
to the outputs, and the questions to the auditors. A decision in here is a bug in the root.
"""

from canary.fleet.run import Fleet, run_fleet

__all__ = ["Fleet", "run_fleet"]
