"""One short question to the Hugging Face hub: does it have this name?

It comes before the libraries' downloads, which ask a hub that doesn't answer again and again, for half a minute.
"""

from __future__ import annotations

from typing import Literal

from huggingface_hub import HfApi

# HTTPError is that of httpx, or of httpx2 in newer versions: only here it goes by one name.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_PATIENCE = 4.0
"""Seconds to wait for each part of the answer."""


def find_hub_problem(name: str, kind: Literal["model", "dataset"], *, revision: str | None = None) -> str | None:
    """Return why the hub can't give `name`, as the end of a sentence about it; None where it can."""
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_PATIENCE)
    except HFValidationError:
        return "no name there looks like this"
    except RevisionNotFoundError:
        return f"its {kind} of that name has no revision {revision!r}"
    except RepositoryNotFoundError:
        return f"it has no such {kind}, or only for those with a token (hf auth login)"
    except (OSError, ValueError, HTTPError) as error:  # ValueError: no JSON, as of a hotel's network.
        return f"it can't be reached ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    return None
