"""The rules of the tree which no linter knows. ARROWS is the architecture diagram."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CANARY = sorted((ROOT / "canary").rglob("*.py"))
CLUSTER = sorted((ROOT / "cluster").rglob("*.py"))

# Who may import whom. The pure root knows no world; the folders touch it; agent and cli wire.
ARROWS = {
    "events": set(),
    "config": set(),
    "wire": {"events"},
    "plan": {"config", "events"},
    "sessions": {"events"},
    "ledger": {"events", "config", "sessions"},
    "evidence": set(),
    "normal": set(),
    "detector": {"events", "config", "evidence", "normal"},
    "scope": {"events"},
    "past": {"events"},
    "failure": {"events", "config", "past", "scope"},
    "incident": {"events", "config", "failure", "past", "scope"},
    "promise": {"config", "detector", "events", "evidence", "normal", "plan"},
    "gate": {"events", "config"},
    "sight": {"events"},
    "selfcheck": {"events"},
    "watch": {"events", "config", "ledger", "detector", "incident", "sight"},
    "drivers": {"events", "config", "wire"},
    "fleet": {"events", "plan", "watch", "drivers", "wire", "selfcheck"},
    "outputs": {"events", "gate"},
    "agent": {"events", "plan", "watch", "drivers", "fleet", "outputs"},
    "rehearsal": {"events", "config", "plan", "agent"},
    "cli": {
        "events",
        "config",
        "plan",
        "promise",
        "drivers",
        "scope",
        "gate",
        "agent",
        "outputs",
        "rehearsal",
    },
    "__main__": {"cli"},
    "__init__": set(),
}
PURE = {
    "events",
    "config",
    "wire",
    "plan",
    "sessions",
    "ledger",
    "evidence",
    "normal",
    "detector",
    "scope",
    "past",
    "failure",
    "incident",
    "promise",
    "gate",
    "sight",
    "selfcheck",
    "watch",
}
WIRING = {"agent", "__init__", "__main__"}
WORLD = {"asyncio", "logging", "os", "socket", "subprocess", "sys", "threading", "time"}


def part(path: Path) -> str:
    """The box of the diagram which a file lies in: its folder, or its own name."""
    return path.relative_to(ROOT / "canary").parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "canary":
            names += [f"canary.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return names


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CANARY, ids=shown)
def test_imports_follow_the_arrows(path: Path):
    names = imports(path)
    inside = {name.split(".")[1] for name in names if name.startswith("canary.")}
    assert inside - {part(path)} <= ARROWS[part(path)]
    outside = {name.split(".")[0] for name in names} - {"canary"}
    assert "cluster" not in outside
    if part(path) in PURE:
        assert outside - {"msgspec"} <= sys.stdlib_module_names - WORLD  # msgspec: records, no world


def test_the_arrows_have_no_cycle_and_the_pure_root_stays_pure():
    TopologicalSorter(ARROWS).prepare()
    assert all(ARROWS[name] <= PURE for name in PURE)
    assert {path.stem for path in (ROOT / "canary").glob("*.py")} == PURE | WIRING


@pytest.mark.parametrize("path", CLUSTER, ids=shown)
def test_the_proving_ground_does_not_know_the_canary(path: Path):
    assert not any(name.split(".")[0] == "canary" for name in imports(path))


@pytest.mark.parametrize("path", CANARY + CLUSTER, ids=shown)
def test_a_function_fits_on_a_screen(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 70, f"{shown(path)}:{node.lineno}"


@pytest.mark.parametrize("path", CANARY + CLUSTER, ids=shown)
def test_a_module_opens_with_its_contract(path: Path):
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source))


def test_no_file_is_named_for_nothing():
    banned = {"base", "common", "core", "helpers", "manager", "misc", "service", "util", "utils"}
    assert not banned & {path.stem for path in CANARY + CLUSTER}


MIRRORS_ELSEWHERE = {
    "canary/__main__.py": "tests/e2e/test_gate.py, where a rollout runs it",
    "canary/outputs/follower.py": "tests/outputs/test_traces.py, which needs an exporter to keep",
    "canary/fleet/client.py": "tests/fleet/test_run.py, for a client alone does nothing",
    "canary/fleet/auditor.py": "tests/fleet/test_run.py and tests/simulation, where heartbeats go missing",
    "canary/rehearsal/programme.py": "tests/e2e/test_catalogue.py, on real clusters",
    "canary/rehearsal/stage.py": "tests/e2e/test_rehearsal.py, on the real cluster",
}


@pytest.mark.parametrize("path", [p for p in CANARY if p.name != "__init__.py"], ids=shown)
def test_every_module_has_a_test_of_its_own(path: Path):
    inside = path.relative_to(ROOT / "canary")
    mirror = ROOT / "tests" / inside.with_name(f"test_{inside.name}")
    whole = ROOT / "tests" / f"test_{part(path)}.py"  # the command line is tested as a user meets it
    assert mirror.exists() or whole.exists() or shown(path) in MIRRORS_ELSEWHERE
