"""`smolora plan` against the run that it is of: the time of the whole and of its parts, tokens per second, the peak.

Each case is planned and then run, one process after the other, each from the interpreter's start to its end. Cases: a
random llama of 15M parameters on rows shaped like E2E (45 to 95 tokens) and like SAMSum (150 to 700), with held-out
rows, evaluations and checkpoints; the real story model on E2E's dev set; and the whole of the 15M one trained.

python benchmarks/plan.py --cases e2e samsum stories full       # about seven minutes
"""

from __future__ import annotations

import argparse
import json
import os
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _measuring import ROOT, find_shared, print_table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging
from tuning import SHAPES

from smolora.tokenizers.char import CharTokenizer
from smolora.tokenizers.pretrained import to_pretrained

LENGTHS = {"e2e": (45, 96, 0.55), "samsum": (150, 701, 0.85)}
"""Fewest tokens of a row, one more than most, and the share that is prompt."""

CASES = {
    "e2e": ("15M, E2E-like rows, 120 steps", {"max_steps": 120, "save_steps": 40}),
    "samsum": ("15M, SAMSum-like rows, 20 steps", {"max_steps": 20, "save_steps": 10}),
    "stories": ("stories260K, E2E, 300 steps", {"max_steps": 300, "per_device_train_batch_size": 16}),
    "full": ("15M, all of it trained, E2E-like rows, 60 steps", {"max_steps": 60, "save_steps": 30}),
}
"""What the table calls it, and settings of `training`."""

_RUN = """
import json, sys, time
from pathlib import Path
from smolora.cli.terminal import open_terminal
open_terminal()
from smolora.config import ExperimentConfig, resolve_config
config = resolve_config(ExperimentConfig, assignments=sys.argv[2:])
from smolora.recipes.finetune import finetune
from smolora.runtime.memory import MemoryManager
from smolora.training.callback import Callback

class Clock(Callback):
    steps, tokens = 0.0, 0
    def on_train_begin(self, trainer):
        self.begun = time.time()
    def on_step_end(self, trainer, record):
        self.steps, self.tokens = self.steps + record.seconds, self.tokens + record.input_tokens
    def on_train_end(self, trainer):
        self.ended = time.time()

clock = Clock()
finetune(config, Path(sys.argv[1]), callbacks=[clock])
peak = MemoryManager().get_memory_usage().process_peak
print(json.dumps([clock.begun, clock.ended, clock.steps, clock.tokens, peak]))
"""


class Account(NamedTuple):
    """What a run takes, predicted or seen."""

    whole: float
    """Seconds, as all times."""
    start: float
    """To the first evaluation or step."""
    steps: float
    pauses: float
    """Evaluations and checkpoints."""
    ending: float
    """Adapter, verdict, report, and the interpreter's end."""
    tokens_per_second: float
    """Input tokens over the seconds of the steps."""
    peak: float
    """MiB."""


NAMES = ("whole, s", "start, s", "steps, s", "evaluations and checkpoints, s", "ending, s", "tokens/s", "peak, MiB")


def write_inputs(folder: Path) -> None:
    """Write a random llama that reads letters, and rows of random letters: what they say takes no time."""
    config = LlamaConfig(**SHAPES["15m"], tie_word_embeddings=True, max_position_embeddings=1024)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    to_pretrained(CharTokenizer.train([string.ascii_letters + " "]), 1024).save_pretrained(folder / "base")
    draw = np.random.default_rng(0)
    for kind, (fewest, end, share) in LENGTHS.items():
        lines = []
        for length in draw.integers(fewest, end, 2000 if kind == "e2e" else 300):
            text = "".join(draw.choice(list(string.ascii_letters), length - 2))  # A space and an end token come to it.
            cut = round(length * share)
            lines.append(json.dumps({"prompt": text[:cut], "completion": text[cut:]}) + "\n")
        (folder / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")


def list_settings(case: str, folder: Path) -> list[str]:
    """Return what goes on the command line of a case."""
    values: dict[str, object] = {f"training.{name}": value for name, value in CASES[case][1].items()}
    if case == "stories":
        model, rows = find_shared("models/stories260K/config.json").parent, find_shared("data/e2e/devset.csv")
        fields: dict[str, object] = {"data.prompt_field": "mr", "data.completion_field": "ref"}
        fields["training.learning_rate"] = 1e-2
    else:
        model, rows = folder / "base", folder / ("samsum.jsonl" if case == "samsum" else "e2e.jsonl")
        fields = {"adapter.method": "full"} if case == "full" else {}
    values = {"model.name_or_path": model, "data.sources": rows, **fields, **values}
    return [f"{name}={value}" for name, value in values.items()]


def ask_for_plan(settings: list[str], environment: dict[str, str]) -> Account:
    """Return what `smolora plan` predicts."""
    command = [sys.executable, "-m", "smolora.cli", "plan", "--json", "--quiet", *settings]
    made = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    seconds = made["seconds"]
    return Account(
        whole=seconds["total"],
        start=seconds["preparation"],
        steps=seconds["steps"],
        pauses=seconds["evaluations"] + seconds["checkpoints"],
        ending=seconds["verdict"] + seconds["ending"],
        tokens_per_second=made["tokens_per_second"],
        peak=made["memory"]["peak"] / 2**20,
    )


def watch_run(settings: list[str], out: Path, environment: dict[str, str]) -> Account:
    """Run what was planned and return what it took."""
    started = time.time()
    command = [sys.executable, "-c", _RUN, str(out), *settings]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True).stdout
    gone = time.time()
    begun, ended, steps, tokens, peak = json.loads(output.splitlines()[-1])
    return Account(
        whole=gone - started,
        start=begun - started,
        steps=steps,
        pauses=ended - begun - steps,
        ending=gone - ended,
        tokens_per_second=tokens / steps,
        peak=peak / 2**20,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(folder)
        for case in args.cases:
            settings = list_settings(case, folder)
            started = time.perf_counter()
            predicted = ask_for_plan(settings, environment)
            title = f"{CASES[case][0]}; the plan took {time.perf_counter() - started:.0f} s"
            seen = watch_run(settings, folder / f"run-{case}", environment)
            rows = [
                (name, before, after, f"{100 * (before / after - 1):+.1f} %")
                for name, before, after in zip(NAMES, predicted, seen, strict=True)
            ]
            print_table(title, ["", "predicted", "seen", "error"], rows)


if __name__ == "__main__":
    main()
