"""What a head reads of an answer, computed in one pass of its frozen base and kept in the cache.

The hidden states after some layers, averaged over the answer's tokens, and a few readings of how
likely the base finds the answer. Heads on one base share what is kept, so a reward head and an
evaluator cost one pass between them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..config import InstructMiningError, ModelRef
from ..data.tokenization import Encoded, end_ids, template_version
from . import hub
from .batching import Failed, pad
from .causal_lm import LM, NOT_FINITE, decoder, load_lm, target_nll
from .heads import HeadFile, head_path, read_head
from .loading import LoadedModel
from .state_store import StateStore
from .trunk import Trunk, digest, open_trunk

READINGS = (  # of an answer of n tokens, log-likelihoods in nats a token
    "log_tokens",  # log n
    "ll", "ll_sd", "ll_least",  # mean, standard deviation and least after the question
    "easy",  # share of tokens that were nearly certain, as repeated text is
    "ll_first", "ll_end",  # of the first token, and of the token that ends the answer (0 if cut)
    "ll_alone",  # mean with nothing before the answer
)  # fmt: skip
_EASY = 0.1  # nats that a nearly certain token costs at most
_LAYOUT = 2  # of a kept row; raise it when what is computed changes
NO_TOKEN = "no response token"


@dataclass
class OpenHead(LoadedModel):
    """A head with its base. file : the head; lm : the base, shared by the heads that read it."""

    file: HeadFile | None = None
    lm: LM | None = None

    def scores(self, rows: Sequence[Encoded]) -> tuple[np.ndarray, list[str]]:
        """Scores of answers, shape (n, columns), NaN where the reason beside it is not ""."""
        found, reasons = self.lm.pooled.features(rows)
        width = len(found.T) - len(READINGS)
        kept = [width + READINGS.index(name) for name in self.file.readings]
        return self.file(found[:, [*range(width), *kept]]), reasons

    def reads(self, about: Mapping[str, Any]) -> bool:
        """Whether its base is this model: revision, dtype and template (its version) are alike."""
        dtype = str(self.lm.dtype).removeprefix("torch.")
        template = template_version(self.lm.tokenizer, self.lm.template)
        own = {"revision": self.lm.resolved.revision, "dtype": dtype, "template": template}
        return all(about.get(name) == value for name, value in own.items())


def open_head(ref: ModelRef, columns: Sequence[str], *, device: str | None = None) -> OpenHead:
    """Open `head:NAME` and its base, whose dtype is the reference's; columns : it must give.

    Raises InstructMiningError for another head, or another base than it was trained on.
    """
    resolved = hub.resolve(ref)
    head = read_head(head_path(ref.id))
    if head.columns != tuple(columns):
        raise InstructMiningError(
            f"{ref.id} gives {', '.join(head.columns)}; asked for is {', '.join(columns)}")
    device = device or hub.pick_device()
    lm = _base(head.base, head.base_revision, ref.dtype, device, head.layers)
    width = len(head.layers) * lm.config.hidden_size + len(head.readings)
    if max(head.layers) > lm.config.num_hidden_layers or len(head.weights) != width:
        raise InstructMiningError(f"{ref.id} does not fit its base {head.base}")
    return OpenHead(lm.model, lm.tokenizer, resolved, lm.device, lm.dtype, lm.max_tokens,
                    head.note, file=head, lm=lm)


@lru_cache(maxsize=1)
def _base(name: str, revision: str, dtype: str, device: str, layers: tuple[int, ...]) -> LM:
    """The base of the heads that read these layers, with what they share of it."""
    lm = load_lm(ModelRef(name, dtype=dtype), device, template="chat")
    if lm.resolved.revision != revision:
        raise InstructMiningError(
            f"the head was trained on {name} {revision}, and here it is {lm.resolved.revision}")
    lm.pooled = Pooled(lm, layers)
    return lm


class Pooled:
    """Features of answers, computed once and kept in the cache.

    layers : decoder layers, counted from 1, whose outputs are averaged over an answer's tokens
    A kept row is of shape (`width`,), float32: the means, layer by layer, then `READINGS`. Its key
    is the base's identity, the dtype and the row's token ids, so template and length count too.
    trunk : `keep_below`'s; what it keeps of a row is of the same pass
    """

    def __init__(self, lm: LM, layers: Sequence[int]) -> None:
        self.lm, self.layers, self.trunk = lm, tuple(layers), None
        self.width = len(self.layers) * int(lm.config.hidden_size) + len(READINGS)
        what = json.dumps([lm.resolved.revision, str(lm.dtype), self.layers, _LAYOUT])
        folder = files.cache() / "pooled" / hashlib.sha256(what.encode()).hexdigest()[:16]
        self.store = StateStore(folder, self.width, np.float32)

    def keep_below(self, layers: int) -> None:
        """Keep, of the rows computed from now on, what enters the top `layers`; 0: nothing."""
        self.trunk: Trunk | None = open_trunk(self.lm, layers)

    def features(
        self, rows: Sequence[Encoded], *, progress: bool = False
    ) -> tuple[np.ndarray, list[str]]:
        """Features, shape (n, width), NaN where the reason beside it is not ""."""
        ends = end_ids(self.lm.tokenizer)
        names = [digest(row) for row in rows]
        usable = {name: row for name, row in zip(names, rows, strict=True) if _answer(row, ends)}
        failed = self._fill(usable, ends, progress)
        fine = [name for name in usable if name not in failed]
        kept = dict(zip(fine, self.store.read(fine), strict=True))
        nothing = np.full((1, self.width), np.nan, np.float32)
        found = [nothing, *(kept.get(name, nothing) for name in names)]
        reasons = ["" if name in kept else failed.get(name, NO_TOKEN) for name in names]
        return np.concatenate(found)[1:], reasons

    def mean_nll(self, rows: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Mean nll of answers' tokens, the one that ends an answer left out: after what was said
        before, and with nothing before (shape (n,), nats a token), NaN where a reason is not "".
        """
        found, reasons = self.features(rows)
        given, alone = (-found[:, READINGS.index(name) - len(READINGS)].astype(np.float64)
                        for name in ("ll", "ll_alone"))  # fmt: skip
        fine = np.isfinite(given) & np.isfinite(alone)
        return given, alone, [
            why if why or ok else NOT_FINITE for why, ok in zip(reasons, fine, strict=True)
        ]

    def _fill(self, rows: dict[bytes, Encoded], ends: frozenset[int], progress: bool):
        """Compute and keep what is not there yet; returns why rows could not be computed."""
        lacking, failed = self.store.missing(rows), {}
        if not lacking:
            return failed

        def keep(numbers: np.ndarray, found: Sequence[np.ndarray | Failed]) -> None:
            made = {lacking[i]: one for i, one in zip(numbers, found, strict=True)}
            failed.update((i, one.reason) for i, one in made.items() if isinstance(one, Failed))
            self.store.write({i: one[None] for i, one in made.items() if i not in failed})

        self.lm.in_batches(
            lambda numbers: self._computed([rows[lacking[i]] for i in numbers], ends),
            [len(rows[name]) for name in lacking], f"pooled states of {len(lacking)} rows", keep,
            progress=progress)  # fmt: skip
        return failed

    @torch.inference_mode()
    def _computed(self, rows: Sequence[Encoded], ends: frozenset[int]) -> list[np.ndarray]:
        start = start_token(self.lm.tokenizer)
        texts = [_answer(row, ends) for row in rows]
        passed = self._passed(rows, self.trunk)
        bare = [Encoded((start, *text), (False, *(True for _ in text))) for text in texts]
        alone = [ll.mean() for _, ll in self._passed(bare)]
        found = []
        for (states, ll), text, bare_ll in zip(passed, texts, alone, strict=True):
            n, own = len(text), ll[: len(text)]
            readings = [np.log(n), own.mean(), own.std(), own.min(), (own > -_EASY).mean(), own[0],
                        ll[n] if len(ll) > n else 0.0, bare_ll]  # fmt: skip
            means = states[:, :n].mean(1).flatten().cpu().numpy()
            found.append(np.concatenate([means, readings]).astype(np.float32))
        return found

    def _passed(
        self, rows: Sequence[Encoded], trunk: Trunk | None = None
    ) -> list[tuple[Tensor, np.ndarray]]:
        """States, shape (layers, targets, width), and log-likelihoods of each row's targets."""
        ids = torch.from_numpy(pad([row.ids for row in rows], self.lm.pad_id)[0])
        ids = ids.to(self.lm.device)
        out = decoder(self.lm.model)(input_ids=ids, use_cache=False, output_hidden_states=True)
        if trunk is not None:
            below = out.hidden_states[trunk.cut]
            trunk.keep(rows, [below[k, : len(row)] for k, row in enumerate(rows)])
        found = []
        for k, row in enumerate(rows):
            places = [i for i, target in enumerate(row.targets) if target]
            before = out.last_hidden_state[k, [i - 1 for i in places]]
            nll = target_nll(self.lm, before, ids[k, places])
            states = torch.stack([out.hidden_states[layer][k, places] for layer in self.layers])
            found.append((states.float(), -nll.double().cpu().numpy()))
        return found


def start_token(tokenizer) -> int:
    """What stands before an answer with nothing before it: bos, or eos where there is none."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _answer(row: Encoded, ends: frozenset[int]) -> list[int]:
    """The answer's tokens without the one that ends it."""
    ids = [token for token, target in zip(row.ids, row.targets, strict=True) if target]
    return ids[:-1] if ids and row.targets[-1] and ids[-1] in ends else ids
