"""Runs every benchmark and writes what they print to benchmarks/RESULTS.md, with the machine and the versions.

python dev.py bench              # all, on a quiet machine: about an hour
python dev.py bench tuning       # those whose command line holds a word
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RUNS = (
    "tuning.py --shape 15m --rows e2e",
    "tuning.py --shape 15m --rows samsum --arms smolora 'trl best' --steps 8",
    "tuning.py --shape 135m --rows e2e --arms smolora 'trl best'",
    "phases.py --shape 135m",
    "gradient_norms.py --sizes 15M 135M",
    "generation.py",
    "merge.py",
    "startup.py",
    "preparation.py",
    "allocator.py --rounds 3",
    "forward.py",
    "nanogpt.py --rounds 1",
)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")


def main(words: list[str]) -> int:
    """Run the chosen benchmarks; return how many failed."""
    chosen = [run for run in RUNS if not words or any(word in run for word in words)]
    sections, failed = [], 0
    for run in chosen:
        print(f"\n$ python benchmarks/{run}", file=sys.stderr, flush=True)
        command = f"{sys.executable} {HERE}/{run}"
        process = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, check=False)
        print(process.stdout, flush=True)
        failed += process.returncode != 0
        sections.append(f"## `python benchmarks/{run}`\n\n```\n{process.stdout.strip()}\n```\n")
    if failed == 0:
        (HERE / "RESULTS.md").write_text("\n".join([_describe(), *sections]), encoding="utf-8")
    return failed


def _describe() -> str:
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed)
    system = f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    return f"# Results\n\nWritten by `python3 dev.py bench`: {system}; {versions}.\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
