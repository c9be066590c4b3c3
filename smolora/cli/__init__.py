"""The command line: `smolora VERB`. A verb imports what it needs when called, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with the code of what happened."""
    try:
        from smolora.cli.app import exit_after_run
    except KeyboardInterrupt:  # A tenth of a second is enough for second thoughts. Nothing may be imported here.
        print("smolora: error: interrupted.", file=sys.stderr)
        sys.exit(130)
    exit_after_run(sys.argv[1:] if arguments is None else arguments)
