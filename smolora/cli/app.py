"""The table of verbs, and the one place where an error becomes an exit code."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from cyclopts import (
    App,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    UnknownOptionError,
    UnusedCliTokensError,
)

from smolora import __version__
from smolora.cli.ahead import plan
from smolora.cli.ask import chat, generate
from smolora.cli.exit_codes import INTERRUPTED, MISTAKE, UNEXPECTED, explain
from smolora.cli.look import compare, report
from smolora.cli.make import merge, prepare, pretrain, probe, train
from smolora.cli.prove import evaluate
from smolora.cli.settings import config, init
from smolora.cli.start import demo, doctor
from smolora.errors import StoppedBySignal
from smolora.runtime.console import print_plainly, stderr_console

_START = Group("Start here", sort_key=1)
_MAKE = Group("Make", sort_key=2)
_ASK = Group("Ask", sort_key=3)
_LOOK = Group("Look", sort_key=4)


def build_app() -> App:
    """Return the parser with every verb."""
    app = App(
        name="smolora",
        help="From raw text to a small language model you can trust, on the machine you have.",
        help_format="plaintext",  # Markdown, the default, imports two parsers: a sixth of the time of --help.
        version=__version__,
        version_flags=["--version"],
        suppress_keyboard_interrupt=False,  # It is said in `run`.
        default_parameter=Parameter(negative="", show_default=False),
    )
    app["--help"].group = app["--version"].group = Group("Options", sort_key=5)
    app.command(demo, group=_START, sort_key=1)
    app.command(doctor, group=_START, sort_key=2)
    app.command(prepare, group=_MAKE, sort_key=1)
    app.command(pretrain, group=_MAKE, sort_key=2)
    app.command(init, group=_MAKE, sort_key=3)
    app.command(config, group=_MAKE, sort_key=4)
    app.command(plan, group=_MAKE, sort_key=5)
    app.command(train, group=_MAKE, sort_key=6)
    app.command(probe, group=_MAKE, sort_key=7)
    app.command(merge, group=_MAKE, sort_key=8)
    app.command(generate, alias="infer", group=_ASK, sort_key=1)
    app.command(chat, group=_ASK, sort_key=2)
    app.command(evaluate, group=_LOOK, sort_key=0)
    app.command(report, group=_LOOK, sort_key=1)
    app.command(compare, group=_LOOK, sort_key=2)
    return app


def exit_after_run(arguments: Sequence[str]) -> NoReturn:
    """Run one command line and exit with the code of what happened."""
    exit_code = run(arguments)
    # All is said: while the libraries end, a Ctrl-C would leave nothing but a traceback.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    _let_go_of_stdout()
    sys.exit(exit_code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        build_app()(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return 0
    except CycloptsError as error:
        return _fail(_describe_usage(error), MISTAKE)
    except BrokenPipeError:  # The reader has had enough, as `head` has.
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted.", INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the edge: what is no mistake of the person's is a bug, and shown whole
        if (explained := explain(error)) is None:
            _say(traceback.format_exc().rstrip())
            return _fail("this is a bug in smolora. Please report it with the lines above.", UNEXPECTED)
        return _fail(*explained)


def _describe_usage(error: CycloptsError) -> str:
    verb = " ".join(["smolora", *(error.command_chain or ())])
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        more = error.unused_tokens[0]
        return f"unexpected argument '{more}'. Text of several words stands in quotes. See {verb} --help."
    if isinstance(error, MissingArgumentError) and error.argument:
        name, *_ = error.argument.names
        what = f"{name} with a value" if error.argument.index is None else name.removeprefix("--").upper()
        return f"{verb} needs {what}. See {verb} --help."
    if isinstance(error, UnknownOptionError) and error.command_chain:
        from smolora.cli.equal_flags import find_equal

        flag = error.token.keyword or error.token.value
        if equal := find_equal(error.command_chain[0], flag):
            return f"Unknown option: {flag}. Did you mean {equal}?"
    return " ".join(str(error).split())


def _let_go_of_stdout() -> None:
    """Send what can't be written nowhere: at its end Python would try again, complain, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, exit_code: int) -> int:
    kind = "" if exit_code == StoppedBySignal.exit_code else "error: "  # A run that was stopped did as it was told.
    if message:
        _say(f"smolora: {kind}{message}")
    return exit_code


def _say(text: str) -> None:
    print_plainly(stderr_console(), text)
