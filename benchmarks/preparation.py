"""`smolora prepare` against the same steps on `datasets`: read, clean, drop duplicates, split, write.

Rows are about 400 bytes of made-up words, one in twenty a repetition. Each preparation is a process of its own, in
turns, measured after the imports; MB are of the file that is read. Cleaning is normalize_whitespace; rows of `html`
hold some tags, which strip_html removes.

python benchmarks/preparation.py --megabytes 200 --kinds jsonl txt html --rounds 3
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import datasets
from _measuring import measure_call, measure_in_turns, median, print_table

from smolora.config import DataConfig
from smolora.data.cleaning import TextCleaningProcessor
from smolora.recipes.prepare import prepare

TOOLS = ("datasets", "smolora")
KINDS = ("jsonl", "txt", "html")


def write_rows(path: Path, kind: str, megabytes: int) -> None:
    """Write a file of so many megabytes."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randrange(2, 9))) for _ in range(5000)]
    earlier: list[str] = []
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            if earlier and draw.random() < 0.05:
                line = draw.choice(earlier)
            else:
                line = _make_line(draw.choices(words, k=draw.randrange(55, 85)), kind, len(earlier))
                earlier.append(line)
            size += file.write(line)


def _make_line(words: list[str], kind: str, number: int) -> str:
    words[7] += str(number)
    if kind == "html":
        words[3:5] = [f"<b>{words[3]}</b>", f'<a href="x.html">{words[4]}</a>&amp;']
    text = " ".join(words)
    return f"{text}\n" if kind == "txt" else json.dumps({"text": text.replace(" ", "\n", 1), "id": number}) + "\n"


def choose_cleaning(kind: str) -> tuple[str, ...]:
    """Return the switches for a kind of rows."""
    return ("strip_html", "normalize_whitespace") if kind == "html" else ("normalize_whitespace",)


def prepare_by_datasets(source: Path, kind: str, out: Path) -> None:
    """Do the steps with `datasets` and its cache in `out`; order is kept and the split is as large as ours."""
    clean = TextCleaningProcessor.from_names(choose_cleaning(kind)).clean
    reader = "text" if kind == "txt" else "json"
    rows = datasets.load_dataset(reader, data_files=str(source), split="train", cache_dir=str(out / "cache"))
    rows = rows.map(lambda row: {"text": clean(row["text"])})
    seen: set[int] = set()

    def is_new(row: dict[str, str]) -> bool:
        size = len(seen)
        seen.add(hash(row["text"]))
        return len(seen) > size

    rows = rows.filter(is_new)
    parts = rows.train_test_split(test_size=min(500, len(rows) // 20), seed=0)
    parts["train"].to_json(out / "train.jsonl")
    parts["test"].to_json(out / "validation.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--child", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    if args.child:
        [kind] = args.kinds
        with tempfile.TemporaryDirectory(dir=args.source.parent) as place:
            out = Path(place) / "out"
            calls = {
                "datasets": lambda: prepare_by_datasets(args.source, kind, out),
                "smolora": lambda: prepare(args.source, out, DataConfig(clean=choose_cleaning(kind))),
            }
            print(json.dumps(measure_call(calls[args.child])))
        return
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / ("rows.txt" if kind == "txt" else "rows.jsonl")
            write_rows(source, kind, args.megabytes)
            _print_costs(args, kind, source)


def _print_costs(args: argparse.Namespace, kind: str, source: Path) -> None:
    costs = measure_in_turns(__file__, args.tools, ["--kinds", kind, "--source", str(source)], args.rounds)
    rows = [
        (
            name,
            args.megabytes / median([cost.seconds for cost in found]),
            args.megabytes / median([cost.cpu_seconds for cost in found]),
            max(cost.peak_bytes for cost in found) / 2**20,
            max(cost.peak_anonymous_bytes for cost in found) / 2**20,
        )
        for name, found in costs.items()
    ]
    title = f"prepare {args.megabytes} MB of {kind}, median of {args.rounds} processes, after the imports"
    print_table(title, ["", "MB/s", "MB/s of CPU", "peak MiB", "without mapped files"], rows)


if __name__ == "__main__":
    main()
