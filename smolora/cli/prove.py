"""The verb that says how good answers are: evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from smolora.cli.flags import AnswerFlags, RowFlags
from smolora.cli.terminal import open_terminal
from smolora.runtime.console import print_plainly

if TYPE_CHECKING:
    from smolora.recipes.evaluation_request import EvaluationRequest


def evaluate(
    model: str | None = None,
    /,
    *,
    base: str | None = None,
    predictions: Path | None = None,
    rows: RowFlags | None = None,
    flags: AnswerFlags | None = None,
    by_likelihood: bool = False,
    batch_size: int = 16,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    device: str = "auto",
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    quiet: bool = False,
) -> None:
    """Score a model, or any system's predictions, on a benchmark or on rows of your own.

    The same command continues an evaluation that was stopped, where predictions are kept.

    Args:
        model: A run, a model or adapter folder, or a hub id.
        base: Base of the adapter, where it isn't where it was in training.
        predictions: File with a prediction a line, in the order of the benchmark's rows, in place of a model.
        rows: Which rows.
        flags: How answers are drawn.
        by_likelihood: Answer with the likeliest label, in place of written text.
        batch_size: Rows that are answered at a time.
        out: Folder to keep predictions and scores of rows in. Left out, one in the run that is evaluated.
        device: auto, cpu, cuda or mps.
        as_json: Print the result as one JSON object.
        quiet: Show warnings only.
    """
    terminal = open_terminal(quiet=quiet)
    rows, flags = rows or RowFlags(), flags or AnswerFlags()
    from smolora.generation.sampling import SamplingSettings
    from smolora.recipes.evaluation_request import EvaluationRequest

    request = EvaluationRequest(
        model=model,
        base=base,
        predictions=predictions,
        benchmark=rows.benchmark,
        data_dir=rows.data_dir,
        split=rows.split,
        data=rows.to_data(),
        num_samples=rows.num_samples,
        batch_size=batch_size,
        settings=SamplingSettings(**{name: value for name, value in vars(flags).items() if value is not None}),
        by_likelihood=by_likelihood,
        out=out,
        device=device,
    )
    _require_inputs(request)
    from smolora.recipes.evaluate import evaluate as run_evaluate

    with _progress(terminal) as progress_of:
        result = run_evaluate(request, progress_of)
    print(json.dumps(result.to_dict(), allow_nan=False) if as_json else result.describe())
    if result.folder:
        print_plainly(terminal, f"predictions: {result.folder / 'predictions.jsonl'}")


def _require_inputs(request: EvaluationRequest) -> None:
    """Raise where the request is wrong or names what isn't there: `evaluate` does too, but seconds of imports later."""
    from smolora.data.sources import list_remote_sources
    from smolora.models.folders import require_model

    request.check()
    if request.data.sources:
        for name in filter(None, (request.model, request.base)):
            require_model(name)
        list_remote_sources(request.data)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """Yield what makes a listener: a bar on a terminal, elsewhere a plain line now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def listen(num_rows: int) -> Callable[[int], None]:
            task = bar.add_task("rows", total=num_rows)

            def show(num_done: int) -> None:
                bar.update(task, completed=num_done)
                if not console.is_terminal:
                    print_plainly(console, f"rows {num_done}/{num_rows}")

            return show

        yield listen
