"""`smolora pretrain`: from text to a small GPT in a Hugging Face folder, with a tokenizer learned from the same text."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from smolora.config import PretrainConfig
from smolora.errors import DataError
from smolora.records.run_dir import RunDir
from smolora.records.staging import staged_folder
from smolora.recipes.run_folder import recorded_run, settle_config
from smolora.runtime.device import resolve_device
from smolora.runtime.memory import keep_large_blocks
from smolora.runtime.seeding import seed_noise

logger = logging.getLogger(__name__)

_BETAS = (0.9, 0.99)
"""AdamW's decay rates for pretraining: a shorter memory of squares, as GPT-2's successors train small models."""
