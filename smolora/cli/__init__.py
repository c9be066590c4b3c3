"""The command line: `smolora VERB`. A verb imports what it needs when called, so that `--help` answers at once."""

from smolora.cli.app import main

__all__ = ["main"]
