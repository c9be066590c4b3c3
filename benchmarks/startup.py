"""What a person waits for before anything happens: `--help`, `import smolora`, and the first step of a training run.

The first step is compared with the bare imports that any such run needs. Each is a fresh process, in turns.

python benchmarks/startup.py --layers 6 --width 288 --vocab-size 32000 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _measuring import ROOT, median, print_table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from smolora.tokenizers.char import CharTokenizer
from smolora.tokenizers.pretrained import to_pretrained

_FIRST_STEP = """
import os, sys
from pathlib import Path
from smolora.cli.terminal import open_terminal
from smolora.config import DataConfig, ExperimentConfig, ModelConfig
open_terminal(quiet=True)
from smolora.recipes.finetune import finetune
from smolora.training.callback import Callback

class Leave(Callback):
    def on_step_end(self, trainer, record):
        os._exit(0)

model, data, out = sys.argv[1:]
config = ExperimentConfig(model=ModelConfig(name_or_path=model), data=DataConfig(sources=data))
finetune(config, Path(out), callbacks=[Leave()])
"""


def list_commands(folder: Path) -> dict[str, list[str]]:
    """Return what is timed, by its name in the table."""
    python = [sys.executable, "-c"]
    rows, out = str(folder / "rows.jsonl"), str(folder / f"run-{time.monotonic_ns()}")
    return {
        "python": [*python, "pass"],
        "import smolora": [*python, "import smolora"],
        "smolora --help": [sys.executable, "-m", "smolora.cli", "--help"],
        # Left at once, as the first step is: taking an interpreter down costs half a second.
        "bare imports": [*python, "import torch, transformers, peft, accelerate, os; os._exit(0)"],
        "first step": [*python, _FIRST_STEP, str(folder / "base"), rows, out],
    }


def write_inputs(args: argparse.Namespace, folder: Path) -> None:
    """Write a random llama and rows to train it on."""
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 48,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    transformers_logging.disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    to_pretrained(CharTokenizer.train(["abc"]), 512).save_pretrained(folder / "base")
    rows = [{"prompt": f"What is {number}?", "completion": f"A number, {number}."} for number in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rounds": 5, "layers": 6, "width": 288, "vocab-size": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # Empty: where a shell says that no bytecode is kept, every process would compile what was installed without it.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(args, folder)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in list_commands(folder)}
        for _ in range(args.rounds):
            for name, command in list_commands(folder).items():
                seconds[name].append(_time_command(command, environment, folder))
    floors = {"first step": "bare imports"}
    rows = []
    for name, found in seconds.items():
        wall, cpu = (median([pair[side] for pair in found]) for side in (0, 1))
        floor, cpu_floor = (median([pair[side] for pair in seconds[floors.get(name, "python")]]) for side in (0, 1))
        rows.append((name, wall, wall - floor, cpu, cpu - cpu_floor))
    title = f"start of a process, median of {args.rounds}; above: python alone, or the bare imports for the first step"
    print_table(title, ["", "s", "above", "CPU s", "above"], rows)


def _time_command(command: list[str], environment: dict[str, str], folder: Path) -> tuple[float, float]:
    """Return seconds on the wall, and of the processors."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=folder)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, cpu


if __name__ == "__main__":
    main()
