"""What a run is, as frozen pydantic models. Nothing here imports torch or touches a model."""

from smolora.config.adapter import ATTENTION_ONLY, BOTH, MLP_ONLY, LoRAConfig
from smolora.config.data import DataConfig
from smolora.config.dataset_size import optimize_for_dataset_size
from smolora.config.evaluation import EvaluationConfig
from smolora.config.experiment import (
    ExperimentConfig,
    PrepareConfig,
    PretrainConfig,
    RunConfig,
    dump_config,
    flatten_settings,
    resolve_config,
)
from smolora.config.model import GPTConfig, ModelConfig, TokenizerConfig
from smolora.config.phases import DynamicLoRAConfig, PhaseConfig, PhaseStart, PlateauConfig
from smolora.config.presets import PRESETS
from smolora.config.speed import SpeedConfig
from smolora.config.training import TrainingConfig

__all__ = [
    "ATTENTION_ONLY",
    "BOTH",
    "MLP_ONLY",
    "PRESETS",
    "DataConfig",
    "DynamicLoRAConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "GPTConfig",
    "LoRAConfig",
    "ModelConfig",
    "PhaseConfig",
    "PhaseStart",
    "PlateauConfig",
    "PrepareConfig",
    "PretrainConfig",
    "RunConfig",
    "SpeedConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "dump_config",
    "flatten_settings",
    "optimize_for_dataset_size",
    "resolve_config",
]
