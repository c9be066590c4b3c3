"""What a run is, as frozen pydantic models. Nothing here imports torch or touches a model."""

from smolora.config.adapter import (
    ATTENTION_ONLY,
    BOTH,
    METHODS,
    MLP_ONLY,
    AdaLoRAConfig,
    AdapterConfig,
    DoRAConfig,
    FullConfig,
    IA3Config,
    LayerNormConfig,
    LoftQConfig,
    LoRAConfig,
    LowRankConfig,
    PEFTConfig,
    PiSSAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    RSLoRAConfig,
    SoftPromptConfig,
    VeRAConfig,
)
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
    "VeRAConfig",
    "SoftPromptConfig",
    "RSLoRAConfig",
    "PromptTuningConfig",
    "PrefixTuningConfig",
    "PiSSAConfig",
    "PTuningConfig",
    "PEFTConfig",
    "METHODS",
    "LowRankConfig",
    "LoftQConfig",
    "LayerNormConfig",
    "IA3Config",
    "FullConfig",
    "DoRAConfig",
    "AdapterConfig",
    "AdaLoRAConfig",
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
