"""Fail where the package leaves its budgets: file and function lengths, probing, broad excepts, mocks in tests."""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BANNED_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}
PROBES = {"getattr", "hasattr", "setattr"}
BROAD = {"Exception", "BaseException"}
EDGES = {"smolora/cli/app.py"}  # The one place that may catch everything, to turn it into an exit code.
MOCKS = ("Magic" + "Mock", "mock" + ".patch", "mocker" + ".patch")


def main() -> int:
    files = sorted((ROOT / "smolora").rglob("*.py"))
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    complaints = [line for file, tree in trees.items() for line in complaints_of(file, tree)]
    complaints += [line for file in (ROOT / "tests").rglob("*.py") for line in mocks_of(file)]
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in files]
    lengths = [function.end_lineno - function.lineno + 1 for tree in trees.values() for function in functions(tree)]
    probes = 1000 * sum(count_probes(tree) for tree in trees.values()) / sum(lines)
    if statistics.median(lengths) > 12:
        complaints.append(f"median function has {statistics.median(lengths)} lines (at most 12)")
    if probes > 0.5:
        complaints.append(f"{probes:.2f} getattr, hasattr or setattr per 1,000 lines (at most .5)")
    print(
        f"budgets: {len(files)} files, {sum(lines)} lines, median file {statistics.median(lines):.0f}, "
        f"median function {statistics.median(lengths):.0f}, probes {probes:.2f} per 1,000 lines"
    )
    print("\n".join(complaints), file=sys.stderr)
    return 1 if complaints else 0


def complaints_of(file: Path, tree: ast.Module) -> Iterator[str]:
    name = file.relative_to(ROOT).as_posix()
    length = len(file.read_text(encoding="utf-8").splitlines())
    if file.stem in BANNED_NAMES:
        yield f"{name}: a file named {file.stem}"
    if length > 400:
        yield f"{name}: {length} lines (at most 400)"
    for function in functions(tree):
        if (lines := function.end_lineno - function.lineno + 1) > 60:
            yield f"{name}:{function.lineno} {function.name}: {lines} lines (at most 60)"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and is_broad(node) and name not in EDGES:
            yield f"{name}:{node.lineno}: broad except"
        if isinstance(node, ast.ClassDef) and is_section(node) and (fields := count_fields(node)) > 16:
            yield f"{name}:{node.lineno} {node.name}: {fields} fields (at most 16)"


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def count_probes(tree: ast.Module) -> int:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return sum(isinstance(function, ast.Name) and function.id in PROBES for function in calls)


def is_broad(handler: ast.ExceptHandler) -> bool:
    reraises = handler.body and isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None
    name = handler.type.id if isinstance(handler.type, ast.Name) else None
    return not reraises and (handler.type is None or name in BROAD)


def is_section(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "Section" for base in node.bases)


def count_fields(node: ast.ClassDef) -> int:
    return sum(isinstance(item, ast.AnnAssign) for item in node.body)


def mocks_of(file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    return (f"{file.relative_to(ROOT)}: uses {word}" for word in MOCKS if word in text)


if __name__ == "__main__":
    sys.exit(main())
