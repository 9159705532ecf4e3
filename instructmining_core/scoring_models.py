"""The models of a scoring run: named at once, opened when first needed, opened once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructmining_core.indicators import ROLES
from instructmining_core.indicators.opened import identity, open_tokenizer

if TYPE_CHECKING:
    from instructmining_core.hub import Resolved
    from instructmining_core.profiles import ModelRef

_NOBODY = {"model": "", "revision": "", "dtype": "", "stand_in": False, "note": ""}


class Models:
    """Role -> model.

    roles : the roles that have a model
    reward_form : input form of the reward model, "" for its own (`reward.FORMS`)
    """

    def __init__(
        self,
        refs: Mapping[str, ModelRef],
        standins: str | Path | None = None,
        device: str | None = None,
        reward_form: str = "",
    ) -> None:
        unknown = sorted(set(refs) - set(ROLES))
        if unknown:
            raise ValueError(f"unknown role {', '.join(unknown)}; known: {', '.join(ROLES)}")
        self.refs = dict(refs)
        self.roles = frozenset(refs)
        self.standins = Path(standins) if standins is not None else None
        self.device = device
        self.reward_form = reward_form
        self._open: dict[str, Any] = {}
        self._resolved: dict[str, Resolved] = {}

    def describe(self, role: str | None) -> dict[str, Any]:
        """Model id, revision, dtype, stand_in and a note; empty for a role without a model.

        Nothing is loaded: weights are only hashed (folders) or resolved to a commit (hub).
        """
        if role not in self.roles:
            return dict(_NOBODY)
        if role in self._open:
            return identity(self._open[role])
        resolved = self._resolve(role)
        return {
            "model": resolved.id, "revision": resolved.revision, "dtype": self._dtype(role),
            "stand_in": resolved.stand_in, "note": self._note(role),
        }  # fmt: skip

    def open(self, role: str) -> Any:
        """The opened model of a role."""
        if role not in self._open:
            self._open[role] = self._load(role)
        return self._open[role]

    def _load(self, role: str) -> Any:
        ref = self.refs[role]
        if role == "base":
            return open_tokenizer(ref, standins=self.standins)
        if role == "ppl":
            from instructmining_core.lm import load_lm as load
        elif role == "reward":
            from instructmining_core.indicators.reward import load as load_reward

            load = partial(load_reward, form=self.reward_form)
        elif role == "unieval":
            from instructmining_core.indicators.unieval import load
        else:
            from instructmining_core.indicators.encoder import load
        return load(ref, device=self.device, standins=self.standins)

    def _resolve(self, role: str) -> Resolved:
        if role not in self._resolved:
            from instructmining_core import hub

            self._resolved[role] = hub.resolve(self.refs[role], standins=self.standins)
        return self._resolved[role]

    def _dtype(self, role: str) -> str:
        if role == "base":
            return ""
        from instructmining_core import hub

        dtype = hub.pick_dtype(self.refs[role].dtype, self.device or hub.pick_device())
        return str(dtype).removeprefix("torch.")

    def _note(self, role: str) -> str:
        if role != "reward":
            return ""
        from instructmining_core.indicators.reward import note_of

        return note_of(self._config(role), self.reward_form)

    def other_form(self, role: str) -> str:
        """The input form of a reward model where it is not its own, else ""; part of cache keys."""
        if role != "reward" or not self.reward_form:
            return ""
        from instructmining_core.indicators.reward import form_of

        return "" if self.reward_form == form_of(self._config(role)) else self.reward_form

    def _config(self, role: str) -> Any:
        from transformers import AutoConfig

        from instructmining_core import hub

        folder = hub.fetch(self._resolve(role)).folder
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
