"""The peers of benchmarks/tuning.py: trl, a plain loop over transformers and peft, and litgpt, each at its best.

Each takes the base and the adapter of `folder`, the rows in the order of the same StepPlan, and returns the seconds and
the losses of every step. All clip gradients at 1 and update with a fused AdamW; the loops' seconds leave out what makes
the batches.

litgpt has a model, LoRA, weights' converter and loss of its own. Its `bf16-true` holds the adapter in bfloat16 too,
where the others hold it in float32, since its layers multiply in one type only. It wants an older huggingface_hub than
transformers does, and runs with a newer one: pip install --no-deps litgpt==0.5.13; pip install lightning jsonargparse
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smolora.config import TrainingConfig
from smolora.data.collate import collate_padded
from smolora.data.token_dataset import Example, TokenDataset
from smolora.training.plan import StepPlan

_IGNORED = -100
"""The label of a position whose token isn't a target, for all of them."""


class Steps(NamedTuple):
    """What every step of an arm took and lost."""

    seconds: list[float]
    losses: list[float]


def run_trl(folder: Path, rows: TokenDataset, config: TrainingConfig, dtype: torch.dtype) -> Steps:
    """Train with trl's SFTTrainer."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    steps = list(_examples_of_steps(rows, config))
    ordered = [example for examples in steps for example in examples]
    columns = {
        "input_ids": [example.input_ids.tolist() for example in ordered],
        "completion_mask": [example.is_target.astype(int).tolist() for example in ordered],
    }
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_args: object, **_kwargs: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_args: object, **_kwargs: object) -> None:
            seconds.append(time.perf_counter() - self.started)

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_args: object) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=len(steps),
        per_device_train_batch_size=config.per_device_train_batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16=False,  # The weights are bfloat16 already; autocast on top made the step slower.
        gradient_checkpointing=False,
        use_cpu=True,
        max_length=None,
        completion_only_loss=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(
        model=_load_peft(folder, dtype),
        args=settings,
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(folder / "base", pad_token="<|endoftext|>"),
        callbacks=[Clock()],
    )
    trainer.train()
    return Steps(seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def run_peft(folder: Path, rows: TokenDataset, config: TrainingConfig, dtype: torch.dtype) -> Steps:
    """Train transformers' model with peft's adapter in a plain loop."""
    model = _load_peft(folder, dtype)

    def compute_loss(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        # A cache of keys and values, which transformers makes by default, is of no use here.
        return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss

    return _run_loop(model, rows, config, compute_loss)


def run_litgpt(folder: Path, rows: TokenDataset, config: TrainingConfig, dtype: torch.dtype) -> Steps:
    """Train litgpt's model with its LoRA in a plain loop, with the loss in chunks that its recipe has."""
    from litgpt.utils import chunked_cross_entropy

    model = _load_litgpt(folder, dtype)

    def compute_loss(input_ids: Tensor, _attention_mask: Tensor, labels: Tensor) -> Tensor:
        # Causal attention sees no padding on the right. Logits in float32, as Fabric hands them to litgpt's recipe.
        logits = [chunk.float() for chunk in model(input_ids, lm_head_chunk_size=128)]
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, labels[..., 1:], ignore_index=_IGNORED)

    return _run_loop(model, rows, config, compute_loss)


def _run_loop(
    model: nn.Module,
    rows: TokenDataset,
    config: TrainingConfig,
    compute_loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Steps:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    steps = Steps([], [])
    model.train()
    for batch in _padded_batches(rows, config):
        started = time.perf_counter()
        loss = compute_loss(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.losses.append(loss.item())
        steps.seconds.append(time.perf_counter() - started)
    return steps


def _padded_batches(rows: TokenDataset, config: TrainingConfig) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ids, mask and labels, [B, T] each, of every step; padding is on the right."""
    for examples in _examples_of_steps(rows, config):
        batch = collate_padded(examples)
        labels = torch.full_like(batch.input_ids, _IGNORED)
        for place, example in zip(labels, examples, strict=True):
            is_target = torch.from_numpy(example.is_target)
            place[: len(example)][is_target] = torch.from_numpy(example.input_ids[example.is_target]).long()
        assert batch.attention_mask is not None, "padded batches have a mask"
        yield batch.input_ids, batch.attention_mask, labels


def _examples_of_steps(rows: TokenDataset, config: TrainingConfig) -> Iterator[list[Example]]:
    plan = StepPlan(len(rows), config)
    for step in range(plan.total_steps):
        yield [rows[int(index)] for batch in plan.micro_batches(step) for index in batch]


def _load_peft(folder: Path, dtype: torch.dtype) -> nn.Module:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    return PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)


def _load_litgpt(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return litgpt's model with the weights of the base and, in its A matrices, those of the adapter; B is 0."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    settings, adapter = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("base/config.json", "adapter/adapter_config.json")
    )
    config = Config(
        block_size=settings["max_position_embeddings"],
        n_layer=settings["num_hidden_layers"],
        n_embd=settings["hidden_size"],
        n_head=settings["num_attention_heads"],
        n_query_groups=settings["num_key_value_heads"],
        intermediate_size=settings["intermediate_size"],
        padded_vocab_size=settings["vocab_size"],
        rope_base=settings["rope_parameters"]["rope_theta"],
        norm_eps=settings["rms_norm_eps"],
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        lora_r=adapter["r"],
        lora_alpha=adapter["lora_alpha"],
        **{f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")},
    )

    def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = {}
        copy_weights_hf_llama(config, {}, converted, weights)
        return converted

    base = load_file(folder / "base/model.safetensors")
    entries = load_file(folder / "adapter/adapter_model.safetensors").items()
    # Its converter joins matrices A as it joins weights, if they bear the weights' names.
    named = {
        name.removeprefix("base_model.model.").replace(".lora_A", ""): a for name, a in entries if "lora_A" in name
    }
    joined = convert(base | named)
    model = GPT(config)
    starts = {name: joined[f"{name.removesuffix('lora_A')}weight"] for name in model.state_dict() if "lora_A" in name}
    missing, unexpected = model.load_state_dict(convert(base) | starts, strict=False)
    assert not unexpected and all("lora_B" in name for name in missing), (missing, unexpected)
    mark_only_lora_as_trainable(model)
    return model.to(dtype)
