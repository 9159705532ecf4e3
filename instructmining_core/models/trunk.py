"""The frozen layers below the adapters, computed once a row and kept.

LoRA on the top layers leaves every layer below the same for all runs. So what enters the lowest
adapted layer is computed once for each row, kept on disk, and every run computes the layers above
alone. The numbers are those of the whole model, to rounding.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor, nn

from .. import files
from ..data.tokenization import Encoded
from .batching import pad
from .causal_lm import LM, decoder, unwrapped
from .state_store import StateStore

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the largest


class Trunk:
    """What enters decoder layer `cut` (from 0) of a base, for each row; kept in the cache.

    The key is the base's identity (weights, tokenizer, configuration), the cut, the dtype and a
    row's token ids, so template and length count too.
    """

    def __init__(self, lm: LM, cut: int) -> None:
        self.lm, self.cut = lm, cut
        self.layers = decoder_layers(unwrapped(lm.model))
        what = json.dumps([lm.resolved.id, lm.resolved.revision, cut, str(lm.dtype)])
        folder = files.cache() / "trunk" / hashlib.sha256(what.encode()).hexdigest()[:16]
        kind = np.float32 if lm.dtype == torch.float32 else np.int16  # bfloat16's or float16's bits
        self.store = StateStore(folder, int(lm.config.hidden_size), kind)

    def fill(self, rows: Iterable[Encoded]) -> int:
        """Compute and keep what is not there yet; returns how many rows that were."""
        rows = {digest(row): row for row in rows}
        lacking = [rows[one] for one in self.store.missing(rows)]
        if not lacking:
            return 0

        def batch(numbers: np.ndarray) -> list[Tensor]:
            ids, _ = pad([lacking[i].ids for i in numbers], self.lm.pad_id)
            with torch.no_grad(), entering(self.layers[self.cut]) as seen:
                decoder(self.lm.model)(input_ids=torch.from_numpy(ids).to(self.lm.device),
                                       use_cache=False)  # fmt: skip
            return [seen[0][k, : len(lacking[i])] for k, i in enumerate(numbers)]

        self.lm.in_batches(
            batch, [len(row) for row in lacking], "states of rows",
            lambda numbers, states: self.keep([lacking[i] for i in numbers], states))
        return len(lacking)

    def keep(self, rows: Sequence[Encoded], states: Sequence[Tensor]) -> None:
        """Keep what enters the cut for these rows: one array of shape (tokens, width) each."""
        made = zip(rows, states, strict=True)
        self.store.write({digest(row): self._numbers(one) for row, one in made})

    def states(self, rows: Sequence[Encoded]) -> list[Tensor]:
        """The kept states of rows, each of shape (tokens, width), on the CPU. See `StateStore`."""
        kept = self.store.read(list(map(digest, rows)))
        found = [torch.from_numpy(np.array(one)) for one in kept]
        return [one.view(self.lm.dtype) if one.dtype == torch.int16 else one for one in found]

    @contextmanager
    def from_states(self, states: Tensor) -> Iterator[None]:
        """A forward pass of the decoder inside the block starts at the cut, with these states."""
        below = self.layers[: self.cut]
        for layer in below:
            layer.forward = lambda *_, **__: states
        try:
            yield
        finally:
            for layer in below:
                del layer.forward

    @contextmanager
    def of_rows(self, rows: Sequence[Encoded], side: str) -> Iterator[None]:
        """As `from_states`, for a batch of kept rows that is padded on a side."""
        kept = nn.utils.rnn.pad_sequence(self.states(rows), batch_first=True, padding_side=side)
        with self.from_states(kept.to(self.lm.device)):
            yield

    def _numbers(self, states: Tensor) -> np.ndarray:
        states = states.detach().to("cpu", self.lm.dtype).contiguous()
        return (states if states.dtype == torch.float32 else states.view(torch.int16)).numpy()


def open_trunk(lm: LM, layers: int) -> Trunk | None:
    """The trunk below the top `layers` of a base; None for all layers, or for a base that cannot be
    cut, which is warned of: it is then computed whole.

    Asked on one row: the pass from the kept states must give the whole model's hidden states.
    """
    depth = len(decoder_layers(unwrapped(lm.model)))
    if not 0 < layers < depth:
        return None
    trunk = Trunk(lm, depth - layers)
    vocabulary = unwrapped(lm.model).get_input_embeddings().weight.shape[0]
    ids = torch.arange(3, 27, device=lm.device)[None] * 7 % vocabulary
    lm.model.eval()
    try:
        with torch.no_grad():
            whole = decoder(lm.model)(input_ids=ids, use_cache=False).last_hidden_state
            with entering(trunk.layers[trunk.cut]) as seen:
                decoder(lm.model)(input_ids=ids, use_cache=False)
            with trunk.from_states(seen[0]):
                above = decoder(lm.model)(input_ids=ids, use_cache=False).last_hidden_state
        apart = (above - whole).abs().max() / whole.abs().max()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        apart = str(error)
    if isinstance(apart, str) or not apart <= _TOLERANCE[lm.dtype]:
        warnings.warn(f"{lm.resolved.id} cannot be cut below its top {layers} layers "
                      f"({apart}); every run computes the whole model.", stacklevel=2)
        return None
    return trunk


@contextmanager
def on_trunk(lm: LM, layers: int, rows: Iterable[Encoded]) -> Iterator[None]:
    """Inside the block these rows are computed by the top `layers` alone, from kept states.

    rows : all that will be trained on or evaluated; layers : 0 for all of them, which keeps nothing
    """
    trunk = open_trunk(lm, layers)
    if trunk is not None:
        trunk.fill(rows)
        _ = lm.head  # found now, by a pass over made-up tokens that no kept states are for
    lm.trunk = trunk
    try:
        yield
    finally:
        lm.trunk = None


def digest(row: Encoded) -> bytes:
    """What a row's states are found by: a hash of its token ids, 16 bytes."""
    return hashlib.sha256(np.asarray(row.ids, np.int64).tobytes()).digest()[:16]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of any Hugging Face causal LM: its largest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


class _Reached(Exception):
    """The layer at which a forward pass is to end."""


@contextmanager
def entering(layer: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets the layer's input; the pass inside the block ends there."""
    seen: list[Tensor] = []

    def look(_, arguments, options):
        seen.append(arguments[0] if arguments else options["hidden_states"])
        raise _Reached

    hook = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with suppress(_Reached):
            yield seen
    finally:
        hook.remove()
