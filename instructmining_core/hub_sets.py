"""Data sets of the Hugging Face hub by name, with the commit that was read."""

from __future__ import annotations

from collections.abc import Iterator

from instructmining_core.readers import HUB_NAME, Raw, RecordError


def resolve_set(where: str, revision: str = "main") -> str:
    """`where` with its commit and split filled in: "owner/name[/config]@<commit>:<split>".

    where : "owner/name[/config][@revision][:split]"; the split is "train" unless named.
    revision : branch, tag or commit to resolve where `where` names none.
    Raises RecordError without network, and for a set that is gated or does not exist.
    """
    from huggingface_hub import HfApi

    named = HUB_NAME.match(where).groupdict()
    wanted = named["revision"] or revision
    try:
        commit = HfApi().dataset_info(named["name"], revision=wanted).sha
    except Exception as error:
        raise RecordError(
            f"{where}: expected a file here or a data set of the hub at {wanted!r}; the hub says: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. If it is "
            "gated, accept its terms on its page and run `hf auth login`"
        ) from error
    config = f"/{named['config']}" if named["config"] else ""
    return f"{named['name']}{config}@{commit}:{named['split'] or 'train'}"


def read_set(resolved: str) -> Iterator[Raw]:
    """Every record of a set in its published order, streamed.

    resolved : what `resolve_set` returned. Raises RecordError.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise RecordError(
            f"{resolved}: hub names need the `datasets` package: pip install 'instructmining[hub]'"
        ) from None
    named = HUB_NAME.match(resolved).groupdict()
    try:
        rows = load_dataset(
            named["name"],
            named["config"],
            split=named["split"],
            revision=named["revision"],
            streaming=True,
        )
        for row, value in enumerate(rows):
            yield Raw(row, row + 1, "record", value)
    except (ValueError, OSError, RuntimeError) as error:
        raise RecordError(f"{resolved}: the hub's data set cannot be read: {error}") from error
