"""Experiments by name: each call of `PRESETS[name]` gives the configuration of a run on a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from smolora.config.adapter import LoRAConfig
from smolora.config.data import DataConfig
from smolora.config.experiment import ExperimentConfig
from smolora.config.model import ModelConfig
from smolora.config.phases import DynamicLoRAConfig
from smolora.config.training import TrainingConfig
from smolora.errors import ConfigError, did_you_mean

_MODEL = "HuggingFaceTB/SmolLM2-135M"
_FIELDS = {"e2e": ("mr", "ref"), "samsum": ("dialogue", "summary")}
"""Columns of prompt and completion by benchmark."""


def _experiment(benchmark: str, target: str, phases: DynamicLoRAConfig | None = None) -> ExperimentConfig:
    prompt_field, completion_field = _FIELDS[benchmark]
    return ExperimentConfig(
        model=ModelConfig(name_or_path=_MODEL),
        data=DataConfig(prompt_field=prompt_field, completion_field=completion_field),
        adapter=LoRAConfig(r=4, lora_alpha=32, lora_dropout=0.1, target_modules=target),
        # The held-out file has thousands of rows: evaluated as often as by default, it would cost more than training.
        training=TrainingConfig(max_steps=1000, warmup_steps=10, per_device_train_batch_size=16, eval_steps=500),
        phases=phases or DynamicLoRAConfig(),
    )


def _dynamic(benchmark: str) -> ExperimentConfig:
    return _experiment(benchmark, "both", DynamicLoRAConfig(strategy="both,mlp,attn"))


PRESETS: Mapping[str, Callable[[], ExperimentConfig]] = {
    "e2e_attention": partial(_experiment, "e2e", "attention_only"),
    "e2e_mlp": partial(_experiment, "e2e", "mlp_only"),
    "e2e_dynamic": partial(_dynamic, "e2e"),
    "samsum_attention": partial(_experiment, "samsum", "attention_only"),
    "samsum_mlp": partial(_experiment, "samsum", "mlp_only"),
    "samsum_dynamic": partial(_dynamic, "samsum"),
}
"""By name. The dynamic ones train attention and MLP, then the MLP, then attention, in equal shares of the run."""


def read_preset(name: str) -> dict[str, object]:
    """Return what a preset sets, as nested settings without its model.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset '{name}'.{did_you_mean(name, PRESETS)} Presets: {', '.join(PRESETS)}.")
    settings: dict[str, object] = PRESETS[name]().model_dump(exclude_unset=True, exclude={"model"})
    return settings


def name_benchmark(preset: str) -> str:
    """Return the benchmark that a preset runs on.

    >>> name_benchmark("e2e_mlp")
    'e2e'
    """
    return preset.partition("_")[0]
