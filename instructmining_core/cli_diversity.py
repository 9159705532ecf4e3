"""How diverse a selection is, for the report of `select`, where an encoder is named."""

from __future__ import annotations

import argparse
from typing import Any

from instructmining_core.cli_models import asked_models
from instructmining_core.selection import Selection
from instructmining_core.source_rows import SourceRows
from instructmining_core.weights import HubError

LARGEST = 20_000  # kept rows above which a CPU would embed for more than minutes


def diversity(
    args: argparse.Namespace, selection: Selection, sources: SourceRows
) -> dict[str, Any]:
    """Vendi score and nearest neighbours inside the kept rows, or `left_out` with the reason.

    The encoder is that of `--models encoder=ID`, else the profile's.
    """
    ref = asked_models(args.profile, args.models).get("encoder")
    if ref is None:
        return {"left_out": "no encoder is named: give --profile, or --models encoder=ID"}
    rows = len(selection.kept)
    if rows > LARGEST:
        return {"left_out": f"{rows:,} rows were kept, and more than {LARGEST:,} are not embedded"}
    from instructmining_core.indicators import encoder
    from instructmining_core.indicators.diversity import of_set
    from instructmining_core.indicators.text import read

    try:
        model = encoder.load(ref)
    except HubError as error:
        return {"left_out": str(error)}
    return of_set([read(messages) for messages in sources.fetch(selection.kept)], model)
