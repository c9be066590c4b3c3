#!/usr/bin/env python3
"""The habits of this project, one word each: `python3 dev.py WORD`. Standard library only.

The first call makes .venv and installs the project with the pinned versions of constraints.txt; later calls reuse it
until pyproject.toml or constraints.txt changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / ".dev-stamp"
# Tests run in one process per core; a second thread in each costs more than it gives.
# Bytecode is kept, also where a shell says not to: pytest's rewriting of the tests is a third of their collection.
TEST_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": ""}

WORDS = {
    "setup": "make .venv and install everything",
    "format": "rewrite the code in the project's format",
    "check": "format, lint, types, layers and budgets",
    "test": "the default tests",
    "test-all": "every test, with coverage",
    "docs": "check that the documentation's links lead somewhere",
    "bench": "the benchmarks (quiet machine, many minutes)",
    "demo": "from nothing to a small model that answers, offline",
}


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 11):
        print(f"smolora needs Python 3.11 or newer; this is {sys.version.split()[0]}.", file=sys.stderr)
        return 2
    if not arguments or arguments[0] not in WORDS:
        found = f"unknown word '{arguments[0]}'\n" if arguments and arguments[0] not in ("-h", "--help") else ""
        print(f"{found}usage: python3 dev.py WORD [arguments]\n", file=sys.stderr)
        print("\n".join(f"  {word:<9} {meaning}" for word, meaning in WORDS.items()), file=sys.stderr)
        return 2 if found or not arguments else 0
    word, rest = arguments[0], arguments[1:]
    if code := setup():
        return code
    return run_word(word, rest)


def setup() -> int:
    """Make .venv once for this pyproject.toml and constraints.txt."""
    files = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in files) + sys.version.encode()).hexdigest()
    if STAMP.is_file() and STAMP.read_text() == wanted:
        return 0
    started = time.perf_counter()
    print("setting up .venv (about a minute) ...", file=sys.stderr, flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    # Not this interpreter: where .venv is activated, it has just been removed.
    code = run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(VENV)])
    code = code or run([str(PYTHON), "-m", "pip", "install", "-q", "-e", ".[dev]", "-c", "constraints.txt"])
    if code == 0:
        STAMP.write_text(wanted)
        print(f"set up in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return code


def run_word(word: str, rest: list[str]) -> int:
    python = str(PYTHON)
    pytest = [python, "-m", "pytest", "-n", os.environ.get("SMOLORA_TEST_PROCESSES", "2"), "--dist", "worksteal"]
    if word == "format":
        return run([python, "-m", "ruff", "format", "."]) or run([python, "-m", "ruff", "check", "--fix", "."])
    if word == "check":
        return run_all(
            [python, "-m", "ruff", "format", "--check", "."],
            [python, "-m", "ruff", "check", "."],
            [python, "-m", "mypy"],
            [str(PYTHON.parent / "lint-imports"), "--no-cache"],
            [python, "tests/architecture/budgets.py"],
        )
    if word == "test":
        return run([*pytest, "-q", *rest], TEST_ENVIRONMENT)
    if word == "test-all":
        report = ["--cov", "--cov-report=term:skip-covered", "--cov-fail-under=80"]
        return run([*pytest, "-q", "-m", "not gpu", *report, *rest], TEST_ENVIRONMENT)
    if word == "bench":
        return run([python, "-m", "pip", "install", "-q", "-e", ".[bench]", "-c", "constraints.txt"]) or run(
            [python, "benchmarks/_all.py", *rest]
        )
    if word == "docs":
        return run([python, "tests/architecture/documents.py"])
    if word == "demo":
        code = run([python, "-m", "smolora.cli", "demo", *rest])
        if not code and not shutil.which("smolora"):
            activate = PYTHON.parent.relative_to(ROOT) / "activate"
            print(f"\n`smolora` is in an environment of its own here: source {activate}", file=sys.stderr)
        return code
    return 0


def run_all(*commands: list[str]) -> int:
    """Run every command, and return the first code that isn't 0."""
    return next((code for code in [run(command) for command in commands] if code), 0)


def run(command: list[str], environment: dict[str, str] | None = None) -> int:
    print(
        "$", " ".join(Path(part).name if part == command[0] else part for part in command), file=sys.stderr, flush=True
    )
    try:
        return subprocess.call(command, cwd=ROOT, env={**os.environ, **(environment or {})})
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
