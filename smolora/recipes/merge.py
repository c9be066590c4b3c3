"""`smolora merge`: the adapter of a run, or an adapter folder, becomes a plain model folder."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from smolora.adapters.adapter_files import read_adapter
from smolora.adapters.merge import MergeReport, merge_adapter
from smolora.adapters.store import find_adapter
from smolora.errors import ConfigError
from smolora.records.run_dir import RunDir
from smolora.runtime.memory import keep_large_blocks
from smolora.runtime.signals import interrupting_signals


def merge(source: Path, out: Path | None = None, *, base: str | Path | None = None) -> MergeReport:
    """Merge an adapter into its base, verify it, and write the merged model.

    Args:
        source: A run, or an adapter folder.
        out: The new folder. Left out, it is `final_merged` in the run.
        base: The base's folder, hub id or run, where the adapter's own record doesn't lead to it.

    Raises:
        ConfigError: `out` exists and isn't empty, or is left out for an adapter that is in no run.
        ModelError: There is no adapter, or it can't be merged.
        FolderInUseError: The run is being trained.
    """
    keep_large_blocks()  # Else every tensor is written into pages that the kernel has to zero first.
    adapter = find_adapter(source)
    run = RunDir(os.path.normpath(adapter / os.pardir))  # The parent of `.` would be `.`.
    if out is None and not RunDir.is_run(run.path):
        read_adapter(adapter)  # What holds no adapter is refused as such.
        raise ConfigError(f"{adapter} is in no run, so the merged model has no default place. Name one with -o.")
    # No run may rewrite the adapter meanwhile. One that this process may only read can be merged elsewhere yet.
    is_guarded = RunDir.is_run(run.path) and (out is None or run.is_lockable)
    with run.locked() if is_guarded else nullcontext(), interrupting_signals():
        return merge_adapter(adapter, out or run.merged, base=base)
