"""From raw text to a small language model you can trust, on the machine you have.

A name is imported when it is first used: `import smolora` takes milliseconds and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # For type checkers and editors; at run time `__getattr__` does it.
    from smolora.adapters.attach import setup_model_with_lora
    from smolora.adapters.store import load_bundle
    from smolora.adapters.wrapper import PEFTModelWrapper
    from smolora.analysis.plots import (
        plot_gradient_evolution,
        plot_gradient_norms,
        plot_layer_comparison,
        plot_layer_heatmap,
        plot_training_loss,
    )
    from smolora.analysis.summary import generate_summary_report
    from smolora.api import PEFTTrainer, SmoLoRA
    from smolora.config import (
        ATTENTION_ONLY,
        BOTH,
        MLP_ONLY,
        PRESETS,
        DataConfig,
        DynamicLoRAConfig,
        EvaluationConfig,
        ExperimentConfig,
        GPTConfig,
        LoRAConfig,
        ModelConfig,
        PEFTConfig,
        PhaseConfig,
        PretrainConfig,
        TokenizerConfig,
        TrainingConfig,
        optimize_for_dataset_size,
    )
    from smolora.data.benchmarks import DatasetType, load_and_preprocess_dataset
    from smolora.data.classification import TextClassificationPreprocessor
    from smolora.data.cleaning import TextCleaningProcessor
    from smolora.data.collate import get_data_collator
    from smolora.data.common_datasets import COMMON_DATASETS
    from smolora.data.pipeline import DatasetPipeline, chunk_texts
    from smolora.data.preprocessing import get_preprocessor
    from smolora.data.preprocessor import DataPreprocessor
    from smolora.data.readers import read_csv, read_jsonl, read_txt_folder
    from smolora.data.seq2seq import Seq2SeqPreprocessor
    from smolora.data.sources import DatasetHandler, load_dataset_from_hub, load_text_data, prepare_dataset
    from smolora.data.spans import QuestionAnsweringPreprocessor
    from smolora.data.token_dataset import TextDataset
    from smolora.data.word_labels import TokenClassificationPreprocessor
    from smolora.errors import (
        BrokenRunError,
        ConfigError,
        DataError,
        FailedElsewhere,
        FolderInUseError,
        ModelError,
        SmoloraError,
        StoppedBySignal,
        StorageError,
    )
    from smolora.evaluation.compute_metrics import compute_metrics
    from smolora.evaluation.evaluator import ModelEvaluator
    from smolora.evaluation.metrics import MetricsCalculator, get_metrics_calculator
    from smolora.evaluation.result import EvaluationResult
    from smolora.evaluation.tasks import evaluate_e2e, evaluate_multi_nli, evaluate_samsum, evaluate_wikisql
    from smolora.generation.sampling import SamplingSettings
    from smolora.generation.text_generator import TextGenerator
    from smolora.inference.pipeline import InferencePipeline
    from smolora.integrations.hf_trainer import GradientMeasuringTrainer, to_trainer_callback
    from smolora.integrations.tracking import MLflowCallback, TensorBoardCallback, TrackioCallback, WandBCallback
    from smolora.models.bundle import ModelBundle, print_trainable_parameters
    from smolora.models.gpt import FeedForward, GPTModel, MultiHeadAttention, TransformerBlock
    from smolora.models.registry import ModelRegistry
    from smolora.models.wrapper import BaseModelWrapper
    from smolora.records.gradient_log import GradientNormLog
    from smolora.runtime.device import DeviceManager
    from smolora.runtime.memory import MemoryManager
    from smolora.tokenizers.bpe import BPETokenizer
    from smolora.tokenizers.char import CharTokenizer
    from smolora.training.callback import Callback
    from smolora.training.callbacks import EarlyStoppingCallback
    from smolora.training.gradients import GradientNormCallback, measure_gradient_norms
    from smolora.training.phases import DynamicLoRACallback, create_layerwise_lora_config, create_phased_lora_config
    from smolora.training.schedules import get_scheduler
    from smolora.training.strategies import AdaptiveLRStrategy, EarlyStoppingStrategy, TrainingStrategy
    from smolora.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "ATTENTION_ONLY",
    "AdaptiveLRStrategy",
    "BOTH",
    "BPETokenizer",
    "BaseModelWrapper",
    "BrokenRunError",
    "COMMON_DATASETS",
    "Callback",
    "CharTokenizer",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DataPreprocessor",
    "DatasetHandler",
    "DatasetPipeline",
    "DatasetType",
    "DeviceManager",
    "DynamicLoRACallback",
    "DynamicLoRAConfig",
    "EarlyStoppingCallback",
    "EarlyStoppingStrategy",
    "EvaluationConfig",
    "EvaluationResult",
    "ExperimentConfig",
    "FailedElsewhere",
    "FeedForward",
    "FolderInUseError",
    "GPTConfig",
    "GPTModel",
    "GradientMeasuringTrainer",
    "GradientNormCallback",
    "GradientNormLog",
    "InferencePipeline",
    "LoRAConfig",
    "MLP_ONLY",
    "MLflowCallback",
    "MemoryManager",
    "MetricsCalculator",
    "ModelBundle",
    "ModelConfig",
    "ModelError",
    "ModelEvaluator",
    "ModelRegistry",
    "MultiHeadAttention",
    "PEFTConfig",
    "PEFTModelWrapper",
    "PEFTTrainer",
    "PRESETS",
    "PhaseConfig",
    "PretrainConfig",
    "QuestionAnsweringPreprocessor",
    "SamplingSettings",
    "Seq2SeqPreprocessor",
    "SmoLoRA",
    "SmoloraError",
    "StoppedBySignal",
    "StorageError",
    "TensorBoardCallback",
    "TextClassificationPreprocessor",
    "TextCleaningProcessor",
    "TextDataset",
    "TextGenerator",
    "TokenClassificationPreprocessor",
    "TokenizerConfig",
    "TrackioCallback",
    "Trainer",
    "TrainingConfig",
    "TrainingStrategy",
    "TransformerBlock",
    "WandBCallback",
    "chunk_texts",
    "compute_metrics",
    "create_layerwise_lora_config",
    "create_phased_lora_config",
    "evaluate_e2e",
    "evaluate_multi_nli",
    "evaluate_samsum",
    "evaluate_wikisql",
    "generate_summary_report",
    "get_data_collator",
    "get_metrics_calculator",
    "get_preprocessor",
    "get_scheduler",
    "load_and_preprocess_dataset",
    "load_bundle",
    "load_dataset_from_hub",
    "load_text_data",
    "measure_gradient_norms",
    "optimize_for_dataset_size",
    "plot_gradient_evolution",
    "plot_gradient_norms",
    "plot_layer_comparison",
    "plot_layer_heatmap",
    "plot_training_loss",
    "prepare_dataset",
    "print_trainable_parameters",
    "read_csv",
    "read_jsonl",
    "read_txt_folder",
    "setup_model_with_lora",
    "to_trainer_callback",
]

_HOMES = {
    "ATTENTION_ONLY": "smolora.config",
    "AdaptiveLRStrategy": "smolora.training.strategies",
    "BOTH": "smolora.config",
    "BPETokenizer": "smolora.tokenizers.bpe",
    "BaseModelWrapper": "smolora.models.wrapper",
    "BrokenRunError": "smolora.errors",
    "COMMON_DATASETS": "smolora.data.common_datasets",
    "Callback": "smolora.training.callback",
    "CharTokenizer": "smolora.tokenizers.char",
    "ConfigError": "smolora.errors",
    "DataConfig": "smolora.config",
    "DataError": "smolora.errors",
    "DataPreprocessor": "smolora.data.preprocessor",
    "DatasetHandler": "smolora.data.sources",
    "DatasetPipeline": "smolora.data.pipeline",
    "DatasetType": "smolora.data.benchmarks",
    "DeviceManager": "smolora.runtime.device",
    "DynamicLoRACallback": "smolora.training.phases",
    "DynamicLoRAConfig": "smolora.config",
    "EarlyStoppingCallback": "smolora.training.callbacks",
    "EarlyStoppingStrategy": "smolora.training.strategies",
    "EvaluationConfig": "smolora.config",
    "EvaluationResult": "smolora.evaluation.result",
    "ExperimentConfig": "smolora.config",
    "FailedElsewhere": "smolora.errors",
    "FeedForward": "smolora.models.gpt",
    "FolderInUseError": "smolora.errors",
    "GPTConfig": "smolora.config",
    "GPTModel": "smolora.models.gpt",
    "GradientMeasuringTrainer": "smolora.integrations.hf_trainer",
    "GradientNormCallback": "smolora.training.gradients",
    "GradientNormLog": "smolora.records.gradient_log",
    "InferencePipeline": "smolora.inference.pipeline",
    "LoRAConfig": "smolora.config",
    "MLP_ONLY": "smolora.config",
    "MLflowCallback": "smolora.integrations.tracking",
    "MemoryManager": "smolora.runtime.memory",
    "MetricsCalculator": "smolora.evaluation.metrics",
    "ModelBundle": "smolora.models.bundle",
    "ModelConfig": "smolora.config",
    "ModelError": "smolora.errors",
    "ModelEvaluator": "smolora.evaluation.evaluator",
    "ModelRegistry": "smolora.models.registry",
    "MultiHeadAttention": "smolora.models.gpt",
    "PEFTConfig": "smolora.config",
    "PEFTModelWrapper": "smolora.adapters.wrapper",
    "PEFTTrainer": "smolora.api",
    "PRESETS": "smolora.config",
    "PhaseConfig": "smolora.config",
    "PretrainConfig": "smolora.config",
    "QuestionAnsweringPreprocessor": "smolora.data.spans",
    "SamplingSettings": "smolora.generation.sampling",
    "Seq2SeqPreprocessor": "smolora.data.seq2seq",
    "SmoLoRA": "smolora.api",
    "SmoloraError": "smolora.errors",
    "StoppedBySignal": "smolora.errors",
    "StorageError": "smolora.errors",
    "TensorBoardCallback": "smolora.integrations.tracking",
    "TextClassificationPreprocessor": "smolora.data.classification",
    "TextCleaningProcessor": "smolora.data.cleaning",
    "TextDataset": "smolora.data.token_dataset",
    "TextGenerator": "smolora.generation.text_generator",
    "TokenClassificationPreprocessor": "smolora.data.word_labels",
    "TokenizerConfig": "smolora.config",
    "TrackioCallback": "smolora.integrations.tracking",
    "Trainer": "smolora.training.trainer",
    "TrainingConfig": "smolora.config",
    "TrainingStrategy": "smolora.training.strategies",
    "TransformerBlock": "smolora.models.gpt",
    "WandBCallback": "smolora.integrations.tracking",
    "chunk_texts": "smolora.data.pipeline",
    "compute_metrics": "smolora.evaluation.compute_metrics",
    "create_layerwise_lora_config": "smolora.training.phases",
    "create_phased_lora_config": "smolora.training.phases",
    "evaluate_e2e": "smolora.evaluation.tasks",
    "evaluate_multi_nli": "smolora.evaluation.tasks",
    "evaluate_samsum": "smolora.evaluation.tasks",
    "evaluate_wikisql": "smolora.evaluation.tasks",
    "generate_summary_report": "smolora.analysis.summary",
    "get_data_collator": "smolora.data.collate",
    "get_metrics_calculator": "smolora.evaluation.metrics",
    "get_preprocessor": "smolora.data.preprocessing",
    "get_scheduler": "smolora.training.schedules",
    "load_and_preprocess_dataset": "smolora.data.benchmarks",
    "load_bundle": "smolora.adapters.store",
    "load_dataset_from_hub": "smolora.data.sources",
    "load_text_data": "smolora.data.sources",
    "measure_gradient_norms": "smolora.training.gradients",
    "optimize_for_dataset_size": "smolora.config",
    "plot_gradient_evolution": "smolora.analysis.plots",
    "plot_gradient_norms": "smolora.analysis.plots",
    "plot_layer_comparison": "smolora.analysis.plots",
    "plot_layer_heatmap": "smolora.analysis.plots",
    "plot_training_loss": "smolora.analysis.plots",
    "prepare_dataset": "smolora.data.sources",
    "print_trainable_parameters": "smolora.models.bundle",
    "read_csv": "smolora.data.readers",
    "read_jsonl": "smolora.data.readers",
    "read_txt_folder": "smolora.data.readers",
    "setup_model_with_lora": "smolora.adapters.attach",
    "to_trainer_callback": "smolora.integrations.hf_trainer",
}
"""Public name to the module it comes from."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'smolora' has no attribute '{name}'")
    return importlib.import_module(_HOMES[name]).__dict__[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
