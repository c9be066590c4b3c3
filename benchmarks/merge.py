"""`smolora merge` against peft's load, merge_and_unload and save: time and memory, both with the allocator fixed.

Each merge is a process of its own, in turns, and is measured after the imports. Ours includes the proof that the merged
files compute what base and adapter do, and the flush to disk; peft does neither.

python benchmarks/merge.py --layers 30 --width 576 --vocab-size 49152 --dtypes float32 bfloat16 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import peft
import torch
from _measuring import measure_call, measure_in_turns, median, print_table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from smolora.adapters.merge import merge_adapter
from smolora.runtime.memory import keep_large_blocks
from smolora.tokenizers.char import CharTokenizer
from smolora.tokenizers.pretrained import to_pretrained

MERGES = ("peft", "smolora")


def save_pair(args: argparse.Namespace, dtype: str, folder: Path) -> None:
    """Write a random llama, as small ones are shaped, and an adapter on every linear layer that changes its logits."""
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64),
        num_key_value_heads=max(1, args.width // 192),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder / "base")
    to_pretrained(CharTokenizer.train(["abc"]), 2048).save_pretrained(folder / "base")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=args.r, target_modules="all-linear")
    adapted = peft.get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter")


def merge_by_peft(folder: Path, out: Path) -> None:
    """Do what peft's documentation does."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    model.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--child", choices=MERGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    for name, value in {"layers": 30, "width": 576, "vocab-size": 49152, "r": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if args.child:
        keep_large_blocks()
        with tempfile.TemporaryDirectory(dir=args.folder) as place:
            out = Path(place) / "out"
            merges = {
                "peft": lambda: merge_by_peft(args.folder, out),
                "smolora": lambda: merge_adapter(args.folder / "adapter", out),
            }
            print(json.dumps(measure_call(merges[args.child])))
        return
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            save_pair(args, dtype, Path(folder))
            _print_costs(args, dtype, Path(folder))


def _print_costs(args: argparse.Namespace, dtype: str, folder: Path) -> None:
    costs = measure_in_turns(__file__, MERGES, ["--folder", str(folder)], args.rounds)
    seconds, cpu = (
        {name: median([cost[column] for cost in found]) for name, found in costs.items()} for column in (0, 1)
    )
    rows = [
        (
            name,
            seconds[name],
            seconds[name] / seconds["peft"],
            cpu[name],
            cpu[name] / cpu["peft"],
            max(cost.peak_bytes for cost in costs[name]) / 2**20,
            max(cost.peak_anonymous_bytes for cost in costs[name]) / 2**20,
        )
        for name in MERGES
    ]
    size = (folder / "base/model.safetensors").stat().st_size
    title = f"merge into {size / 2**20:.0f} MiB of {dtype}, median of {args.rounds} processes, after the imports"
    print_table(title, ["", "s", "of peft", "CPU s", "of peft", "peak MiB", "without mapped files"], rows)


if __name__ == "__main__":
    main()
