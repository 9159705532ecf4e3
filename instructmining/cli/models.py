"""Which models a command may use: from a profile, from `--models`, stand-ins only if allowed; and
`instructmining pin`, which writes their commits into the profile's YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.files import write_atomic
from instructmining_core.indicators import ROLES
from instructmining_core.models.hub import MARKER

from ..profile import load_profile, profile_path

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
        known = not isinstance(named, str) or any(
            hasattr(transformers, one) for one in (named, named.removesuffix("Fast")))
        if not known:
            notes.append(f"{role}: transformers {transformers.__version__} does not know {named}, "
                         f"which {folder} names as its tokenizer's class: the general one reads "
                         "tokenizer.json")  # fmt: skip
    return notes


@lru_cache(maxsize=1)
def opened_study(profile: str) -> Study:
    """The study of a profile, opened once in a process: its data are costly to read."""
    from ..study import Study

    return Study.open(profile)


COMMIT = re.compile(r"^[0-9a-f]{40}$")
LOCAL = ("standin:", "package:", "head:")

Edit = tuple[int, int, str]  # replace text[start:end]


def pin_profile(name_or_yaml: str, out: str | None) -> list[str]:
    """Resolve what is not a commit yet and write the file; returns what to tell, a line each."""
    source = profile_path(name_or_yaml)
    text = source.read_text(encoding="utf-8")
    target = Path(out) if out else source
    edits, told = pins(yaml.compose(text))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    write_atomic(target, text)
    load_profile(target if target.suffix in (".yaml", ".yml") else name_or_yaml)
    lines = told or ["nothing to pin: no model or set of the hub without a commit in this file"]
    return [*lines, f"written to {target}"]


def pins(root: yaml.Node) -> tuple[list[Edit], list[str]]:
    """Where the text of a composed profile must change, and what is said of each change."""
    edits: list[Edit] = []
    told: list[str] = []
    top = _fields(root)
    for key, node in _fields(top.get("models")).items():
        if key in (*ROLES, "ladder"):
            for one in node.value if isinstance(node, yaml.SequenceNode) else [node]:
                _pin_model(one, edits, told)
    data = _fields(top.get("data"))
    if getattr(data.get("kind"), "value", "") == "hub":
        for key in ("sources", "unseen", "eval_1", "eval_2"):
            node = data.get(key)
            for one in node.value if isinstance(node, yaml.SequenceNode) else [node]:
                where = _fields(one).get("where", one)
                if isinstance(where, yaml.ScalarNode):
                    _pin_set(where, edits, told)
    return edits, told


def _fields(node: yaml.Node | None) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {key.value: value for key, value in node.value}


def _pin_model(node: yaml.Node, edits: list[Edit], told: list[str]) -> None:
    fields = _fields(node)
    name = fields.get("id", node)
    revision = fields.get("revision")
    wanted = revision.value if revision else "main"
    local = (
        name.value.startswith(LOCAL) or name.value.endswith(".gguf") or Path(name.value).is_dir()
    )
    if local or COMMIT.match(wanted):
        return
    commit = _model_commit(name.value, wanted)
    told.append(f"{name.value}: {wanted} is {commit}")
    if revision:
        edits.append((revision.start_mark.index, revision.end_mark.index, commit))
        return
    start, end = name.start_mark, name.end_mark
    if not fields:
        edits.append((start.index, end.index, f"{{id: {name.value}, revision: {commit}}}"))
    elif node.flow_style:
        edits.append((end.index, end.index, f", revision: {commit}"))
    else:
        indent = " " * node.start_mark.column
        edits.append((end.index, end.index, f"\n{indent}revision: {commit}"))


def _pin_set(node: yaml.ScalarNode, edits: list[Edit], told: list[str]) -> None:
    name, _, split = node.value.partition(":")
    name, _, wanted = name.partition("@")
    if COMMIT.match(wanted):
        return
    commit = _set_commit(node.value, wanted or "main")
    told.append(f"{name}: {wanted or 'main'} is {commit}")
    pinned = f"{name}@{commit}" + (f":{split}" if split else "")
    quoted = f'"{pinned}"' if split else pinned
    edits.append((node.start_mark.index, node.end_mark.index, quoted))


def _model_commit(name: str, revision: str) -> str:
    from instructmining_core.models.hub import resolve

    return resolve(ModelRef(name, revision)).revision


def _set_commit(where: str, revision: str) -> str:
    from instructmining_core.data.readers import resolve_set

    return re.search(r"@([^:]+)", resolve_set(where, revision)).group(1)
