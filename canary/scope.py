"""Cells -> scope: where heartbeats go missing, in the shortest words that fit.

Knows: heartbeats and misses counted by label. Does not know: routes, time, alarms, what kind of failure it is.

Cells are compared by likelihood: a conjunction of labels is a rule when the loss inside it is high and outside it is not,
with a price per condition so that chance finds nothing. Relations such as same_node are labels too: without them a
broken link between nodes reads as a list of pairs. Different conjunctions may cover the same cells; then no data could
tell them apart, and all are named.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from heapq import nlargest
from itertools import combinations
from math import inf, log
from operator import and_, or_

from msgspec.structs import replace

from canary.events import Aspect, Conjunction, Labels, Literal, Rate, Rule, Scope

Cells = Mapping[Labels, Rate]

Belief = tuple[frozenset[Conjunction], ...]
"""What a scope says, without its rates."""

ATTRIBUTES: Mapping[str, Callable[[Labels], str]] = {
    "sender.build": lambda labels: labels.sender.build,
    "sender.node": lambda labels: labels.sender.node,
    "sender.region": lambda labels: labels.sender.region,
    "sender": lambda labels: labels.sender.canary,
    "receiver.build": lambda labels: labels.receiver.build,
    "receiver.node": lambda labels: labels.receiver.node,
    "receiver.region": lambda labels: labels.receiver.region,
    "receiver": lambda labels: labels.receiver.canary,
    "session": lambda labels: labels.session,
    "shard": lambda labels: labels.shard,
    "channel": lambda labels: labels.shape.channel,
    "size": lambda labels: labels.shape.size,
    "text": lambda labels: labels.shape.text,
    "same_node": lambda labels: _yes(labels.sender.node == labels.receiver.node),
    "same_region": lambda labels: _yes(labels.sender.region == labels.receiver.region),
    "same_build": lambda labels: _yes(labels.sender.build == labels.receiver.build),
}
"""What a literal may speak of, in the order in which a conjunction is written. The empty value is not known: no literal."""

PREFERENCE = (
    "sender.build",
    "same_node",
    "same_region",
    "shard",
    "receiver.build",
    "same_build",
    "sender.region",
    "receiver.region",
    "sender.node",
    "receiver.node",
    "channel",
    "size",
    "text",
    "session",
    "sender",
    "receiver",
)
"""Of equivalent explanations the one is named first whose words come first here. Builds tell ends apart during a rollout
only, and what has just changed is to blame; relations of place are causes, lists of nodes are symptoms. What a message
is like comes after all places: in the first seconds a place has seen few shapes. One user comes last, for behind every
canary that is alone on its node stands the node."""

_SENDER = ("sender.build", "sender.node", "sender.region", "sender")
_RECEIVER = ("receiver.build", "receiver.node", "receiver.region", "receiver")
_SHAPE = ("channel", "size", "text")
_RELATIONS = ("same_node", "same_region", "same_build")

SPOKEN_OF: Mapping[Aspect, tuple[str, ...]] = {
    Aspect.LIVE: tuple(ATTRIBUTES),
    Aspect.ARRIVAL: tuple(ATTRIBUTES),
    Aspect.LEAK: tuple(ATTRIBUTES),
    Aspect.SEND: (*_SENDER, "shard", *_SHAPE),
    Aspect.LOOK: (*_SENDER, *_RECEIVER, "shard", *_SHAPE, *_RELATIONS),
    Aspect.SESSION: (*_RECEIVER, "shard"),
}
"""What can have to do with a trial: a send has no receiver, a session no message, a look-up no websocket."""

RULES_MAX = 3
DEPTH_MAX = 3
BEAM = 24
LITERALS_MAX = 64
NAMES_MAX = 4 * LITERALS_MAX
"""Conditions tried at once, those with the most misses first, and how many names they may go by: a canary alone on its
node is two. Bounds an evaluation whatever a shard calls its nodes."""


def explain(cells: Cells, tolerated_loss: float, aspect: Aspect = Aspect.LIVE) -> Scope:
    """The smallest conjunctions of labels that explain where trials fail; no rule where nothing stands out.

    Up to three rules, each found on the cells that the ones before it have left over. A loss that is the same everywhere
    is one rule with the empty conjunction.
    """
    counted = {labels: rate for labels, rate in cells.items() if rate.total}
    if not counted:
        return Scope((), Rate(0, 0))
    rules: list[Rule] = []
    table = _Table(counted, tolerated_loss, SPOKEN_OF[aspect])
    while len(rules) < RULES_MAX and (extension := table.best()) is not None:
        descriptions = sorted(table.descriptions(extension), key=_preference)
        rules.append(Rule(tuple(descriptions), table.rate(extension)))
        table.remove(extension)
    if not rules and _lossy_everywhere(table.all, tolerated_loss):
        return Scope((Rule(((),), table.all),), Rate(0, 0))
    return Scope(tuple(rules), table.all)


class _Table:
    """Cells as bits. A set of cells (the extension of a conjunction) is an int, one bit per cell; to count inside it,
    totals and misses are held as planes, the cells whose number has a given binary digit."""

    def __init__(self, cells: Cells, tolerated_loss: float, names: Sequence[str]) -> None:
        misses = [rate.missed for rate in cells.values()]
        self._missed = _planes(misses)
        self._total = _planes([rate.total for rate in cells.values()])
        self._tolerated_loss = tolerated_loss
        self._named = _literals(list(cells), misses, names)
        self._narrow((1 << len(cells)) - 1)

    def _narrow(self, left: int) -> None:
        """Look at these cells only."""
        self._left = left
        self._some_missed = reduce(or_, self._missed, 0) & left
        self.all = self.rate(left)
        partial = {cells & left for cells in self._named.values()} - {left, 0}
        most_missed = nlargest(LITERALS_MAX, partial, key=lambda cells: (_count(cells, self._missed), cells))
        self._extensions = set(most_missed)
        self._literals = {
            literal: cells & left
            for literal, cells in self._named.items()
            if cells & left in self._extensions
        }
        self._alike = _log_likelihood(self.all, self.all.share) + 0.5 * log(max(self.all.total, 1))
        """What two rates must be likelier than."""
        self._price = log(max(len(self._extensions), 1))

    def remove(self, extension: int) -> None:
        self._narrow(self._left & ~extension)

    def rate(self, extension: int) -> Rate:
        return Rate(_count(extension, self._missed), _count(extension, self._total))

    def best(self) -> int | None:
        """The extension with the highest score above 0: all of one literal, all of two, and those of three that build
        on the best of two."""
        scores: dict[int, float] = {}
        level = {self._left}
        for depth in range(1, DEPTH_MAX + 1):
            level = {base & literal for base in level for literal in self._extensions} - scores.keys()
            level = {extension for extension in level if extension & self._some_missed}
            scores |= {extension: self._score(extension, depth) for extension in level}
            if depth >= 2:
                level = set(nlargest(BEAM, level, key=scores.__getitem__))
        # Of equal scores the smallest int wins, so that the answer hangs on the cells alone.
        best = max(scores, key=lambda extension: (scores[extension], -extension), default=0)
        return best if scores.get(best, 0) > 0 else None

    def _score(self, extension: int, depth: int) -> float:
        """How much likelier two rates are, inside and outside, than one for all; less a price for the words spent."""
        inside = self.rate(extension)
        outside = Rate(self.all.missed - inside.missed, self.all.total - inside.total)
        if inside.share <= outside.share:
            return -inf
        apart = _log_likelihood(inside, inside.share)
        apart += _log_likelihood(outside, max(outside.share, self._tolerated_loss))
        return apart - self._alike - depth * self._price

    def descriptions(self, extension: int) -> list[Conjunction]:
        """Every shortest conjunction that holds in these cells and in no other."""
        wider = {words: cells for words, cells in self._literals.items() if extension & ~cells == 0}
        for depth in range(1, DEPTH_MAX + 1):
            found = [
                tuple(sorted(words, key=_written))
                for words in combinations(wider, depth)
                if reduce(and_, (wider[literal] for literal in words)) == extension
            ]
            if found:
                return found
        raise AssertionError("an extension was found without a conjunction")


def _literals(labels: Sequence[Labels], misses: Sequence[int], names: Iterable[str]) -> dict[Literal, int]:
    """The cells in which each condition holds."""
    places: dict[Literal, list[int]] = {}
    for name in names:
        read = ATTRIBUTES[name]
        for place, cell in enumerate(labels):
            if value := read(cell):
                places.setdefault((name, value), []).append(place)
    most_missed = nlargest(
        NAMES_MAX, places, key=lambda literal: sum(map(misses.__getitem__, places[literal]))
    )
    return {literal: _bits(places[literal], len(labels)) for literal in most_missed}


def _bits(places: Iterable[int], size: int) -> int:
    """One bit per place. By way of the written number, which is read in one go."""
    written = bytearray(b"0") * size
    for place in places:
        written[size - 1 - place] = ord("1")
    return int(written, 2)


def _planes(numbers: list[int]) -> list[int]:
    """The places whose number has a one in a digit, for each binary digit, the highest first."""
    digits = max(numbers, default=0).bit_length()
    return [
        _bits([place for place, number in enumerate(numbers) if number >> digit & 1], len(numbers))
        for digit in reversed(range(digits))
    ]


def _count(extension: int, planes: list[int]) -> int:
    """From the highest digit down, as a number is read."""
    number = 0
    for plane in planes:
        number += number + (extension & plane).bit_count()
    return number


def _log_likelihood(rate: Rate, share: float) -> float:
    hits = rate.missed * log(share) if rate.missed else 0.0
    return hits + ((rate.total - rate.missed) * log(1 - share) if rate.missed < rate.total else 0.0)


def _lossy_everywhere(rate: Rate, tolerated_loss: float) -> bool:
    if rate.share <= tolerated_loss:
        return False
    gain = _log_likelihood(rate, rate.share) - _log_likelihood(rate, tolerated_loss)
    return gain > log(len(ATTRIBUTES)) + 0.5 * log(rate.total)


def rated(scope: Scope, cells: Cells) -> Scope:
    """The same rules with the rates of today."""
    left, rules = dict(cells), []
    for rule in scope.rules:
        inside = [labels for labels in left if covers(rule, labels)]
        rules.append(replace(rule, inside=_sum(left.pop(labels) for labels in inside)))
    return Scope(tuple(rules), _sum(left.values()))


def covers(rule: Rule, labels: Labels) -> bool:
    return all(ATTRIBUTES[name](labels) == value for name, value in rule.conjunctions[0])


def belief(scope: Scope) -> Belief:
    return tuple(frozenset(rule.conjunctions) for rule in scope.rules)


def spell(conjunction: Conjunction) -> str:
    """The conjunction as people read it."""
    return " & ".join(f"{name}={value}" for name, value in conjunction) or "everywhere"


def _sum(rates: Iterable[Rate]) -> Rate:
    listed = list(rates)
    return Rate(sum(rate.missed for rate in listed), sum(rate.total for rate in listed))


def _written(literal: Literal) -> int:
    return list(ATTRIBUTES).index(literal[0])


def _preference(conjunction: Conjunction) -> tuple[list[int], Conjunction]:
    return sorted(PREFERENCE.index(name) for name, _ in conjunction), conjunction


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
