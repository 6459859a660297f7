"""One heartbeat as a waterfall in the terminal: the spans that Jaeger would show, from the journal alone.

It reads the same spans as the exporter makes, so a person who knows one view knows the other.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from canary.events import Closed
from canary.outputs import traces
from canary.outputs.failures import failures
from canary.outputs.words import kind_in_words

BAR_WIDTH = 24
"""In cells. A terminal of 80 columns has room for it beside names, places and results."""
EIGHTHS = " ▏▎▍▌▋▊▉█"


def render_waterfall(closed: Closed, fleet: str) -> RenderableType:
    """What became of the heartbeat in a sentence, then its spans: who, when within the whole, how long, with what result."""
    spans = traces.spans_of(closed, fleet)
    root, *children = spans
    children.sort(key=lambda span: (span.start_time or 0, span.end_time or 0))
    return Group(_headline(closed), _sentence(closed), _table(root, children))


def _headline(closed: Closed) -> Text:
    heartbeat = closed.heartbeat
    due = datetime.fromtimestamp(heartbeat.due_wall, UTC).isoformat(timespec="milliseconds")
    shape = f"{heartbeat.shape.size} {heartbeat.shape.text} in {heartbeat.shape.channel}"
    return Text(
        f"{heartbeat.id}  shard {heartbeat.shard}, due {due.replace('+00:00', 'Z')}, {shape}\n"
        f"trace {heartbeat.trace_id}",
        style="dim",
    )


def _sentence(closed: Closed) -> Text:
    failed = failures(closed)
    if not failed:
        verdicts = sorted({settled.verdict.value for settled in closed.settled})
        return Text(f"{' and '.join(verdicts).upper() or 'NOT JUDGED'}  {closed.answer}", style="green")
    worst = failed[0]
    return Text(f"{worst.kind.value.upper()}  {kind_in_words(worst.kind)}: {worst.reason}", style="bold red")


def _table(root: ReadableSpan, children: Sequence[ReadableSpan]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("span", no_wrap=True)
    table.add_column("at", no_wrap=True, overflow="ellipsis", max_width=24)
    begin, end = root.start_time or 0, max(span.end_time or 0 for span in (root, *children))
    table.add_column(f"0 {_took(end - begin):>{BAR_WIDTH - 2}}", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("result")
    for span in (root, *children):
        failed = span.status.status_code is StatusCode.ERROR
        table.add_row(
            span.name if span is root else f"  {span.name}",
            _place(span),
            Text(_bar(span, begin, end), style="red" if failed else "cyan"),
            _took((span.end_time or 0) - (span.start_time or 0)),
            Text(_result(span), style="red" if failed else ""),
        )
    return table


def _bar(span: ReadableSpan, begin: int, end: int) -> str:
    """From its start to its end in eighths of a cell; never nothing, however short it was."""
    scale = 8 * BAR_WIDTH / max(end - begin, 1)
    first = min(round(((span.start_time or 0) - begin) * scale), 8 * BAR_WIDTH - 1)
    last = max(round(((span.end_time or 0) - begin) * scale), first + 1)
    lead, full = first // 8, last // 8 - first // 8
    # A block that begins within a cell has no letter; it begins with the cell.
    return " " * lead + "█" * full + (EIGHTHS[last % 8] if last % 8 else "")


def _took(nanoseconds: int) -> str:
    seconds = nanoseconds / 1e9
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _place(span: ReadableSpan) -> str:
    """The node that matters to this span, or who heard it."""
    attributes = span.attributes or {}
    for key in (traces.ROUTE_RECEIVER_NODE, traces.NODE, traces.ROUTE_RECEIVER, traces.CLIENT_ID):
        if key in attributes:
            return str(attributes[key])
    return ""


def _result(span: ReadableSpan) -> str:
    attributes = span.attributes or {}
    kind = attributes.get(traces.KIND)
    if traces.ORACLE in attributes:
        return "found" if attributes[traces.FOUND] else str(kind or "not found")
    if traces.ANSWER in attributes and traces.VERDICT not in attributes:
        build = f" ({attributes[traces.BUILD]!s})" if traces.BUILD in attributes else ""
        return str(attributes[traces.ANSWER]) + build
    words = [attributes.get(traces.VERDICT), kind]
    return ", ".join(dict.fromkeys(str(word) for word in words if word))
