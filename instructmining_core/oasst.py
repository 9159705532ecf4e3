"""Open Assistant's trees of messages: one row is one path from the root to an answer."""

from __future__ import annotations

from instructmining_core.messages import Conversation, FormatError, message


def tree(raw: dict, paths: str) -> list[Conversation]:
    """OASST: the best-ranked reply at each answer, then the follow-up with most replies.

    raw : a tree record; raw["prompt"] is its root message with nested `replies`.
    paths : "best" gives one path, "all" every path that ends in an answer.
    Deleted messages are left out; a follow-up that nobody answered is cut off. Where one reply
    is ranked, unranked ones stand behind it. Raises FormatError.
    """
    root = raw["prompt"]
    found = [_best_path(root)] if paths == "best" else _all_paths(root)
    return [[message(node, "the tree") for node in path] for path in found]


def _replies(node: dict) -> list[dict]:
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise FormatError("a list of messages in 'replies'", replies)
    return [reply for reply in replies if not reply.get("deleted")]


def _best_path(root: dict) -> list[dict]:
    path = [root]
    while replies := _replies(path[-1]):
        if path[-1].get("role") == "assistant":
            path.append(max(replies, key=lambda reply: len(_replies(reply))))
        else:
            ranks = [reply.get("rank") for reply in replies]
            order = [(rank is None, rank or 0) for rank in ranks]
            path.append(replies[order.index(min(order))])
    return _to_last_answer(path)


def _all_paths(root: dict) -> list[list[dict]]:
    found, waiting = {}, [[root]]
    while waiting:
        path = waiting.pop()
        replies = _replies(path[-1])
        waiting += [[*path, reply] for reply in reversed(replies)]
        if not replies:
            ending = _to_last_answer(path)
            found[tuple(map(id, ending))] = ending
    answered = [path for path in found.values() if len(path) > 1]
    return answered or [[root]]


def _to_last_answer(path: list[dict]) -> list[dict]:
    answers = [i for i, node in enumerate(path) if node.get("role") == "assistant"]
    return path[: answers[-1] + 1] if answers else path[:1]
