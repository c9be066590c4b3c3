"""What happened to every row: read, rejected, empty, duplicate, cut, dropped, kept, held out, and what is learned.

The totals must add up: every row that was read is found again under exactly one heading, or the run stops.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from smolora.data.rows import Reject
from smolora.errors import BrokenRunError, DataError, count_of
from smolora.records.run_dir import RunDir
from smolora.records.staging import describe_os_error, write_json, write_text


@dataclass
class EncodingCounts:
    """What became of the rows of one side (train or validation) when they were encoded."""

    rows: int = 0
    """Rows to encode."""
    examples: int = 0
    """Examples that remain."""
    added_by_windows: int = 0
    """Examples more than rows, from long contexts read in windows."""
    dropped_overlong: int = 0
    """Rows past the longest length, dropped because of overlong=drop."""
    dropped_without_target: int = 0
    """Rows with nothing left to learn, dropped."""
    truncated: int = 0
    """Examples cut at the longest length."""
    cut_target_tokens: int = 0
    """Target tokens that truncation cut off."""
    input_tokens: int = 0
    """Tokens of all examples."""
    target_tokens: int = 0
    """Tokens that the loss counts."""


@dataclass
class DataReport:
    """The ledger of one run's data."""

    files: Counter[str] = field(default_factory=Counter)
    """Rows read, per file."""
    rejects: list[Reject] = field(default_factory=list)
    """Malformed rows."""
    empty: int = 0
    """Rows without text."""
    added_by_chunking: int = 0
    """Rows more than before, from splitting long ones."""
    joined: int = 0
    """Pieces that went on where another ended, and became one text with it again (in pretraining)."""
    duplicate: int = 0
    """Rows equal to an earlier one, dropped."""
    also_held_out: int = 0
    """Rows to learn from that the held-out rows (given as separate sources) hold too, dropped."""
    train: int = 0
    """Rows kept to learn from."""
    held_out: int = 0
    """Rows kept to evaluate on."""
    ends_held_out: int = 0
    """Of the rows to learn from, those whose end is held out (of a few long texts in pretraining)."""
    encoded: dict[str, EncodingCounts] = field(default_factory=dict)
    """By side: train, validation."""

    @property
    def read(self) -> int:
        """Rows read from all files."""
        return sum(self.files.values())

    @property
    def kept(self) -> int:
        """Rows that are left, to learn from or to evaluate on."""
        return self.train + self.held_out

    def encoding(self, side: str) -> EncodingCounts:
        """Return the counts of one side, to add to."""
        return self.encoded.setdefault(side, EncodingCounts())

    def check(self) -> None:
        """Raise unless the totals add up.

        Raises:
            BrokenRunError: A row was lost or counted twice.
        """
        accounted = self.kept + len(self.rejects) + self.empty + self.duplicate + self.also_held_out + self.joined
        if self.read + self.added_by_chunking != accounted:
            raise BrokenRunError(
                f"the data report doesn't add up: {self.read} rows read and {self.added_by_chunking} added by "
                f"chunking, but {accounted} accounted for. This is a bug in smolora; please report it with the report."
            )
        for side, counts in self.encoded.items():
            found = counts.examples + counts.dropped_overlong + counts.dropped_without_target
            if counts.rows + counts.added_by_windows != found:
                raise BrokenRunError(
                    f"the data report doesn't add up: {counts.rows} {side} rows encoded, but {found} accounted for. "
                    "This is a bug in smolora; please report it with the data report."
                )

    def check_rejects(self, allowed: int, folder: Path | None) -> None:
        """Raise when more rows were rejected than `allowed`, or all, after writing what was found into `folder`.

        Where that is a run's already, nothing is written: it has the account of its own rows.

        Raises:
            DataError: Too many rows were rejected.
        """
        if not self.rejects or (self.train and len(self.rejects) <= allowed):
            return
        if folder is not None and RunDir(folder).is_started:
            folder = None
        if folder is not None:
            self.write(folder)
        place = f" All are listed in {RunDir(folder).rejects}." if folder is not None else ""
        if not self.train:
            raise DataError(f"no row is left: {self.describe_rejects()}\nRepair them.{place}")
        raise DataError(
            f"{self.describe_rejects()}\nRepair them, or set data.max_rejects={len(self.rejects)} (now {allowed}) to "
            f"go on without them.{place}"
        )

    def describe_rejects(self) -> str:
        """Return how many rows can't be used, and of the first ones where they are and why."""
        shown = [f"  {reject.file}:{reject.line}: {reject.reason}" for reject in self.rejects[:5]]
        more = [f"  and {len(self.rejects) - 5} more"] if len(self.rejects) > 5 else []
        return "\n".join([f"{len(self.rejects)} of {self.read} rows can't be used:", *shown, *more])

    def to_dict(self) -> dict[str, object]:
        """Return the ledger as plain values, for data_report.json."""
        return {
            "read": self.read,
            "added_by_chunking": self.added_by_chunking,
            "rejected": len(self.rejects),
            "empty": self.empty,
            "duplicate": self.duplicate,
            "also_held_out": self.also_held_out,
            "joined": self.joined,
            "kept": self.kept,
            "train": self.train,
            "held_out": self.held_out,
            "ends_held_out": self.ends_held_out,
            "encoded": {side: asdict(counts) for side, counts in self.encoded.items()},
            "files": dict(self.files),
        }

    def write(self, folder: Path) -> None:
        """Write data_report.json and rejects.jsonl into `folder`, creating it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise describe_os_error(error, folder) from error
        write_text(RunDir(folder).rejects, "".join(json.dumps(reject._asdict()) + "\n" for reject in self.rejects))
        write_json(RunDir(folder).data_report, self.to_dict())

    def describe(self) -> str:
        """Return the ledger as text for people: only headings that something fell under."""
        lines = [f"rows read          {self.read:>9,}  from {count_of(len(self.files), 'file')}"]
        counts = {
            "added by chunking": self.added_by_chunking,
            "rejected": len(self.rejects),
            "empty": self.empty,
            "duplicate": self.duplicate,
            "held out too": self.also_held_out,
            "joined again": self.joined,
        }
        lines += [f"  {name:<17}{count:>9,}" for name, count in counts.items() if count]
        lines.append(f"kept               {self.kept:>9,}  {self.train:,} to learn from, {self.held_out:,} held out")
        if self.ends_held_out:
            lines.append(f"  held out besides: the end of {count_of(self.ends_held_out, 'row')}")
        return "\n".join([*lines, *(_describe_side(side, counts) for side, counts in self.encoded.items())])


def _describe_side(side: str, counts: EncodingCounts) -> str:
    examples = count_of(counts.examples, "example")
    parts = [f"{side}: {examples}, {counts.target_tokens:,} of {counts.input_tokens:,} tokens learned"]
    if side != "train":
        parts[0] = parts[0].replace("learned", "evaluated")
    if counts.added_by_windows:
        parts.append(f"{counts.added_by_windows:,} more than rows, from contexts longer than a window")
    if counts.truncated:
        parts.append(f"{counts.truncated:,} truncated ({counts.cut_target_tokens:,} target tokens cut)")
    if counts.dropped_overlong:
        parts.append(f"{counts.dropped_overlong:,} dropped as too long")
    if counts.dropped_without_target:
        parts.append(f"{counts.dropped_without_target:,} dropped with nothing to learn")
    return "; ".join(parts)
