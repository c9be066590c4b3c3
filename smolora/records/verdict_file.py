"""verdict.json of a run: what became of it, in one word and with the measurements behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

SAMPLE_TEXTS = ("prompt", "reference", "base", "tuned")


def read_verdict(path: Path) -> dict[str, object] | None:
    """Return what the file holds; None where there is none, or it can't be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("verdict"), str) else None


def describe_verdict(found: Mapping[str, object]) -> list[str]:
    """Return a verdict as lines: the word and why, then the findings."""
    findings = found.get("findings")
    said = [str(finding) for finding in findings] if isinstance(findings, list) else []
    return [f"{found['verdict']}: {found.get('reason')}", *said]


def list_samples(found: Mapping[str, object]) -> list[dict[str, str]]:
    """Return the answers side by side: prompt, reference, base, tuned."""
    samples = found.get("samples")
    whole = [sample for sample in samples if isinstance(sample, dict)] if isinstance(samples, list) else []
    return [{name: str(sample.get(name, "")) for name in SAMPLE_TEXTS} for sample in whole]
