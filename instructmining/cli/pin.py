"""`instructmining pin`: write the commits of a profile's models and hub sets into its YAML file.

Only values are replaced, at their place in the text: comments and order stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from instructmining_core.config import ModelRef
from instructmining_core.files import write_atomic

from ..profile import load_profile, profile_path

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
    for node in _refs(top.get("models")):
        _pin_model(node, edits, told)
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


def _refs(models: yaml.Node | None) -> list[yaml.Node]:
    """The nodes of `models` that name a model: a text, or a mapping with an `id`."""
    found = []
    for key, node in _fields(models).items():
        if key in ("base", "ppl", "reward", "unieval", "encoder"):
            found.append(node)
        if key == "ladder" and isinstance(node, yaml.SequenceNode):
            found += node.value
    return found


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
