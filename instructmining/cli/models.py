"""Which models a command may use: from a profile, from `--models`, stand-ins only if allowed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.indicators import ROLES
from instructmining_core.models.hub import MARKER

from ..profile import load_profile

if TYPE_CHECKING:
    from ..study import Study


def asked_models(profile: str | None, pairs: Sequence[str]) -> dict[str, ModelRef]:
    """Role -> model: the profile's, overruled by "ROLE=ID" or "ROLE=ID@REVISION" pairs."""
    roles = dict(load_profile(profile).models.roles()) if profile else {}
    for pair in pairs:
        role, _, name = pair.partition("=")
        if role not in ROLES or not name:
            known = ", ".join(ROLES)
            raise InstructMiningError(f"--models {pair!r}: write ROLE=ID, with a role of {known}")
        name, _, revision = name.partition("@")
        roles[role] = ModelRef(name, revision or "main")
    return roles


def asked_form(profile: str | None, form: str | None) -> str:
    """The reward model's input form: the one asked for, else the profile's, "" for its own."""
    return form or (load_profile(profile).models.reward_form if profile else "")


def asked_template(profile: str | None) -> str:
    """The template that perplexity reads rows in: the profile's, "auto" without one."""
    return load_profile(profile).finetune.template if profile else "auto"


def standin_folder(roles: Mapping[str, ModelRef], allowed: bool) -> Path | None:
    """The folder of the stand-ins among `roles`, built if need be; None where there are none.

    Raises InstructMiningError where stand-ins are asked for and not allowed.
    """
    if not roles:  # only numbers of the text itself: the embedded corpus stays unread
        return None
    from ..embedded.standins import PREFIX, build_standins

    found = [role for role, ref in roles.items()
             if ref.id.startswith(PREFIX) or (Path(ref.id) / MARKER).is_file()]  # fmt: skip
    if found and not allowed:
        raise InstructMiningError(
            f"the model of {', '.join(found)} is a stand-in: a tiny model built on the spot, for "
            "trying the code; its scores say nothing of the paper's. Pass --allow-standins to use "
            "it all the same, or name real models with --models or another --profile"
        )
    return build_standins(roles.values())


def folder_notes(roles: Mapping[str, ModelRef]) -> list[str]:
    """What a reader of the scores must know of the models' folders, a line each."""
    import transformers

    notes = []
    for role, ref in roles.items():
        folder = Path(ref.id).expanduser()
        doubled = sorted(folder.glob("consolidated*.safetensors"))
        if doubled and (folder / "model.safetensors.index.json").is_file():
            notes.append(f"{role}: {folder} holds its weights twice; those of its index are read, "
                         f"{doubled[0].name} is not")  # fmt: skip
        named = None
        with suppress(OSError, ValueError, AttributeError):
            told = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
            named = told.get("tokenizer_class")
        if isinstance(named, str) and not (
            hasattr(transformers, named) or hasattr(transformers, named.removesuffix("Fast"))
        ):
            notes.append(
                f"{role}: transformers {transformers.__version__} does not know {named}, which "
                f"{folder} names as its tokenizer's class: the general one reads tokenizer.json"
            )
    return notes


@lru_cache(maxsize=1)
def opened_study(profile: str) -> Study:
    """The study of a profile, opened once in a process: its data are costly to read."""
    from ..study import Study

    return Study.open(profile)
