"""Runs benchmarks and writes what each prints to a section of benchmarks/RESULTS.md, with the machine and versions.

There is a section for each run and each kind of processor: what one measured stays when another measures.

python dev.py bench              # all, on a quiet machine: about an hour
python dev.py bench tuning       # those whose command line holds a word
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RUNS = (
    "tuning.py --shape 15m --rows e2e",
    "tuning.py --shape 15m --rows samsum --arms smolora 'trl best' 'peft loop' litgpt --steps 8",
    "tuning.py --shape 135m --rows e2e --arms smolora 'trl fp32' 'trl best' 'peft loop' litgpt",
    "quantised.py --shape 135m --rounds 1 --steps 8",
    "phases.py --shape 135m",
    "gradient_norms.py",
    "generation.py",
    "merge.py",
    "startup.py",
    "preparation.py",
    "preparation.py --megabytes 1000 --kinds jsonl --rounds 1",
    "plan.py --cases e2e",
    "plan.py --cases samsum",
    "plan.py --cases stories",
    "plan.py --cases full",
    "allocator.py --rounds 3",
    "forward.py",
    "nanogpt.py --rounds 1",
    "nanogpt.py --large --steps 100 --rounds 1",
    "classification.py --data sst2",
    "classification.py --data sick",
)
RESULTS = HERE / "RESULTS.md"
TITLE = "# Results\n\nWritten by `python3 dev.py bench`; what a script asks and measures stands at its head.\n"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "litgpt")


def main(words: list[str]) -> int:
    """Run the chosen benchmarks, each into a section of its own; return how many failed."""
    sections, failed = _read_sections(), 0
    for run in (run for run in RUNS if not words or any(word in run for word in words)):
        print(f"\n$ python benchmarks/{run}", file=sys.stderr, flush=True)
        command = f"{sys.executable} {HERE}/{run}"
        process = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, check=False)
        print(process.stdout, flush=True)
        if process.returncode:
            failed += 1
            continue
        sections[f"{_title(run)} ({_kind()})"] = f"{_describe()}\n\n```\n{process.stdout.strip()}\n```\n"
        # Now, so that what was measured outlives an interrupt.
        ordered = [f"## {title}\n\n{sections[title]}" for title in sorted(sections, key=_place)]
        RESULTS.write_text("\n".join([TITLE, *ordered]), encoding="utf-8")
    return failed


def _title(run: str) -> str:
    return f"`python benchmarks/{run}`"


def _place(title: str) -> int:
    """Return where a section stands: in the order of the runs, behind them if it is of one that is made no more."""
    return next((place for place, run in enumerate(RUNS) if title.startswith(_title(run))), len(RUNS))


def _read_sections() -> dict[str, str]:
    """Return the text of each section of RESULTS.md, by its title."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else ""
    found = (section.split("\n\n", 1) for section in text.split("\n## ")[1:])
    return {title: body.rstrip("\n") + "\n" for title, body in found}


def _kind() -> str:
    """Return the kind of processor: its matrix units, where it has some, change what the rest of a step costs.

    oneDNN can be kept from them, and then multiplies as a processor without.
    """
    units = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        units = f", oneDNN up to {limit}"
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}{units}"


def _describe() -> str:
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed)
    day = datetime.now(tz=UTC).date()
    system = f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    return f"{day}, {system}; {versions}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
