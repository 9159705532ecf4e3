"""A ledger for processes that do every run together: the first reads and writes, all are told.

Each decision of a sweep (is it done, is it mine, what is left) then has one answer on all of them,
whatever a process would see in the folder a moment later, so they take the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

from .distributed import Group, join
from .ledger import Ledger


class SharedLedger:
    """A ledger's methods, each called by all processes of a group, done by the first.

    What the method gives or raises there, it gives or raises on all.
    """

    def __init__(self, ledger: Ledger, group: Group) -> None:
        self.ledger, self.group = ledger, group

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.ledger, name)
        if not callable(found):
            return found
        return lambda *arguments, **options: self._by_first(lambda: found(*arguments, **options))

    @contextmanager
    def locked(self):
        """Hold the ledger for one sweep; see `Ledger.locked`."""
        with ExitStack() as stack:
            self._by_first(lambda: stack.enter_context(self.ledger.locked()) and None)
            yield self

    def _by_first(self, work: Callable[[], Any]) -> Any:
        outcome = None
        if self.group.first:
            try:
                outcome = work(), None
            except Exception as error:
                outcome = None, error
        value, error = self.group.tell(outcome)
        if error is not None:
            raise error
        return value


def for_all(ledger: Ledger | SharedLedger) -> Ledger | SharedLedger:
    """The ledger for every process of a launch (`distributed.join`); itself where there is one."""
    group = join()
    if group.size == 1 or isinstance(ledger, SharedLedger):
        return ledger
    return SharedLedger(ledger, group)
