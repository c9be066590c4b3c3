"""The rows that are held out because they are given as such: files beside the train.jsonl of prepared folders."""

from __future__ import annotations

import logging
from pathlib import Path

from smolora.config.data import DataConfig
from smolora.data.source_files import find_validation_file

logger = logging.getLogger(__name__)


def find_held_out_files(data: DataConfig) -> list[Path]:
    """Return the files of held-out rows in the sources, and none where others are to be held out.

    Empty ones count where every source has one: then nothing was to be held out of any.
    """
    if data.eval_source is not None:
        return []
    files = [
        file for source in data.sources if (file := find_validation_file(Path(source), data.file_type)) is not None
    ]
    return files if any(map(_has_rows, files)) or len(files) == len(data.sources) else []


def choose_held_out_files(data: DataConfig) -> list[Path]:
    """Return what `find_held_out_files` does, and say where it may be taken for something else."""
    if not (files := find_held_out_files(data)):
        return []
    named = " and ".join(map(str, files))
    if not any(map(_has_rows, files)):
        logger.info("no row is held out, as %s is empty. Name others with data.eval_source (--eval-data).", named)
        return files
    if others := [source for source in data.sources if find_validation_file(Path(source), data.file_type) is None]:
        logger.info("held out are the rows of %s, and none of %s.", named, " and ".join(others))
    if data.validation_fraction != DataConfig().validation_fraction:
        logger.warning(
            "data.validation_fraction=%g changes nothing: held out are the rows of %s.", data.validation_fraction, named
        )
    return files


def _has_rows(file: Path) -> bool:
    return file.stat().st_size > 0
