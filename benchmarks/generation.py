"""Greedy answers of mixed lengths: decoding in slots against transformers' `generate` on left-padded batches, in turns.

A llama of 15M parameters with random weights (6 layers, 288 wide, 6 heads, 32,000 words, tied), 64 prompts of 10 to 120
tokens, answers of 8 to 100 tokens without an end token. `generate` runs each batch as far as its longest answer goes,
and counts for the tokens that were wanted. Its best batch size is what smolora's 64 slots are compared with.

smolora drafts tokens from what was said before, so it is asked twice: with weights by which nothing is ever said again,
and with transformers' own first weights, by which an answer is one token over and over. Real answers lie between.

OMP_NUM_THREADS=2 python benchmarks/generation.py
python benchmarks/generation.py --rounds 1 --dtype float32
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from _measuring import median, print_table
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from tuning import NATIVE

from smolora.generation.choosing import Row
from smolora.generation.decoding import decode
from smolora.generation.sampling import SamplingSettings

NUM_PROMPTS, SHORTEST_PROMPT, LONGEST_PROMPT, SHORTEST_ANSWER, LONGEST_ANSWER = 64, 10, 120, 8, 100
VOCAB_SIZE = 32_000
PEER_BATCHES = (8, 16, 32, 64)
GREEDY = SamplingSettings(temperature=0.0)

SCALES = {"never repeat": 0.1, "repeat one token": 0.02}
"""Answers, and the weights that give them."""

Answers = list[list[int]]


def build_model(dtype: torch.dtype, *, scale: float = 0.02) -> LlamaForCausalLM:
    """Return the model in eval mode, its weights of standard deviation `scale`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=256,
        initializer_range=scale,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def draw_work(seed: int = 1) -> tuple[Answers, list[int]]:
    """Return prompts and how many tokens are wanted of each answer."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(SHORTEST_PROMPT, LONGEST_PROMPT + 1, (NUM_PROMPTS,), generator=generator).tolist()
    prompts = [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    wanted = torch.randint(SHORTEST_ANSWER, LONGEST_ANSWER + 1, (NUM_PROMPTS,), generator=generator).tolist()
    return prompts, wanted


def answer_in_slots(model: LlamaForCausalLM, prompts: Answers, wanted: list[int]) -> Answers:
    """Answer with smolora's generator, below its texts."""
    rows = [Row(prompt, room, GREEDY) for prompt, room in zip(prompts, wanted, strict=True)]
    for _ in decode(model, rows, num_slots=NUM_PROMPTS):
        pass
    return [row.ids for row in rows]


def answer_in_batches(model: LlamaForCausalLM, prompts: Answers, wanted: list[int], batch_size: int) -> Answers:
    """Answer with transformers' `generate`."""
    answers: Answers = []
    for start in range(0, len(prompts), batch_size):
        batch, rooms = prompts[start : start + batch_size], wanted[start : start + batch_size]
        width = max(map(len, batch))
        output = model.generate(
            input_ids=torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch]),
            attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]),
            generation_config=GenerationConfig(max_new_tokens=max(rooms), do_sample=False, pad_token_id=0),
        )
        answers += [row[:room] for row, room in zip(output[:, width:].tolist(), rooms, strict=True)]
    return answers


def compare(dtype: torch.dtype, kind: str, rounds: int) -> bool:
    """Time all in turns, print a table, and return whether every answer was that of `generate`."""
    model, (prompts, wanted) = build_model(dtype, scale=SCALES[kind]), draw_work()
    contestants: dict[str, Callable[[], Answers]] = {
        f"generate, batches of {size}": partial(answer_in_batches, model, prompts, wanted, size)
        for size in PEER_BATCHES
    }
    contestants["smolora"] = partial(answer_in_slots, model, prompts, wanted)
    answers = {name: answer() for name, answer in contestants.items()}  # The warm-up.
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, answer in contestants.items():
            started = time.perf_counter()
            answer()
            rates[name].append(sum(wanted) / (time.perf_counter() - started))
    medians = {name: median(values) for name, values in rates.items()}
    best = max((name for name in medians if name != "smolora"), key=lambda name: medians[name])
    # Each round has its own ratio, since a busy moment slows down what runs in it.
    ratio = median([ours / theirs for ours, theirs in zip(rates["smolora"], rates[best], strict=True)])
    same = {name: sum(map(list.__eq__, found, answers["smolora"])) for name, found in answers.items()}
    rows = [[name, medians[name], f"{same[name]} of {NUM_PROMPTS}"] for name in contestants]
    rows.append([f"smolora / {best}", ratio, ""])
    title = f"{NUM_PROMPTS} answers that {kind}, {sum(wanted):,} tokens, {str(dtype).removeprefix('torch.')}"
    print_table(f"{title}, median of {rounds}", ["", "tokens a second", "answers as smolora's"], rows)
    return all(count == NUM_PROMPTS for count in same.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    native = str(NATIVE).removeprefix("torch.")
    types = list(dict.fromkeys(("float32", native)))
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], nargs="*", default=types, help="default: %(default)s"
    )
    args = parser.parse_args()
    is_same = {(name, kind): compare(getattr(torch, name), kind, args.rounds) for name in args.dtype for kind in SCALES}
    if not all(same for (name, _), same in is_same.items() if name == "float32"):
        sys.exit("float32 answers differ from those of transformers' generate.")


if __name__ == "__main__":
    main()
