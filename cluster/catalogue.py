"""The builds and the faults from outside as text, for the command line and for docs/reference/faults.md.

Knows how docstrings become tables; every word about a fault stands where the fault is written.
"""

from cluster.builds import BUILDS, Build
from cluster.faults import FAULTS, Fault

PAGE = """\
# Faults that can be played on the proving ground

Made by `python -m cluster builds --markdown`.

## Builds

`python -m cluster deploy --build NAME` rolls one out over all nodes, with `--region` over one region's, with `--node`
on that node only; `rollback` goes back. An argument, where there may be one, follows a colon: `old-connections:5`.
Whatever a build does, the delivery log tells what was handed to whom.

| build | what is wrong with it |
|---|---|
{builds}

## From outside

`python -m cluster fault KIND TARGET [--for 10s]` begins one, `python -m cluster fault heal [TARGET]` ends it. Links are
broken by `python -m cluster fault wan --from REGION --to REGION --stall` or `--cut`: that is the way of the one region's
clients to the other's nodes, and `--both-ways` takes the way back along. Begin and end are lines of `cluster.jsonl` in
the delivery log. A link's name is `REGION->REGION`.

| fault | on | what it does |
|---|---|---|
{faults}
"""


def table() -> str:
    """One line for each build."""
    width = max(len(_label(build)) for build in BUILDS.values())
    return "".join(f"{_label(build):<{width}}  {_summary(build)}\n" for build in BUILDS.values())


def page() -> str:
    """docs/reference/faults.md."""
    builds = [f"| `{_label(build)}` | {_summary(build)} |" for build in BUILDS.values()]
    faults = [f"| `{fault.kind}` | {fault.targets} | {_summary(fault)} |" for fault in FAULTS.values()]
    return PAGE.format(builds="\n".join(builds), faults="\n".join(faults))


def _label(build: type[Build]) -> str:
    return f"{build.name}[:{build.takes}]" if build.takes else build.name


def _summary(described: type[Build] | type[Fault]) -> str:
    """The first line of its docstring; every build and fault has one of its own."""
    assert described.__doc__ is not None
    return described.__doc__.splitlines()[0]
