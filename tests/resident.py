"""How much of a file that is mapped into this process is in memory; Linux only."""

from __future__ import annotations

import re
from pathlib import Path


def resident_bytes(file: Path) -> int:
    """Bytes of `file` that this process has in memory as mapped pages."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(encoding="utf-8"), flags=re.M)
    own = [mapping for mapping in mappings if mapping.partition("\n")[0].endswith(str(file))]
    return sum(1024 * int(size) for mapping in own for size in re.findall(r"^Rss: +(\d+) kB", mapping, re.M))
