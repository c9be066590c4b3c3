"""The command line: `smolora VERB`. A verb imports what it needs when called, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of what happened."""
    try:
        from smolora.cli.app import exit_after_run
    except KeyboardInterrupt:  # It takes a tenth of a second, enough for second thoughts.
        print("smolora: error: interrupted.", file=sys.stderr)
        sys.exit(130)
    exit_after_run(sys.argv[1:] if arguments is None else arguments)
