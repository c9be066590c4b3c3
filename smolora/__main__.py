"""`python -m smolora`, for where the command `smolora` is not on the path."""

from smolora.cli import main

main()
