"""The beams of a search as a tree of tokens, for its re-execution."""

from collections.abc import Iterator, Sequence

from domain.events import BeamStep
from domain.ids import TokenId

ROOT = 0
"""The node of the text that is continued."""


class SearchTree:
    """The tree of a recorded search: a node for each text that ran as a beam.

    ``running[t]`` are the nodes of the beams after ``t`` steps; beams of two groups may be the
    same text. The parents of a step must be beams of the step before.
    """

    def __init__(self, steps: Sequence[BeamStep]) -> None:
        self._parents = [ROOT]
        self._tokens: list[TokenId] = []
        self._children: dict[tuple[int, TokenId], int] = {}
        self.running: list[tuple[int, ...]] = [(ROOT,)]
        for step in steps:
            before = self.running[-1]
            chosen = zip(step.parents, step.tokens, strict=True)
            self.running.append(tuple(self._grow(before[beam], token) for beam, token in chosen))

    def _grow(self, parent: int, token: TokenId) -> int:
        node = self._children.setdefault((parent, token), len(self._parents))
        if node == len(self._parents):
            self._parents.append(parent)
            self._tokens.append(token)
        return node

    def walk(self, tokens: Sequence[TokenId]) -> Iterator[int]:
        """The nodes that a text passes, from the root to before its last token."""
        node: int | None = ROOT
        for token in tokens:
            if node is None:
                return
            yield node
            node = self._children.get((node, token))

    def lineage(self, node: int) -> list[int]:
        """A node and those it came from, up to the root."""
        found = [node]
        while found[-1] != ROOT:
            found.append(self._parents[found[-1]])
        return found

    def tokens(self, node: int) -> tuple[TokenId, ...]:
        """The tokens that lead to a node."""
        return tuple(self._tokens[one - 1] for one in reversed(self.lineage(node)[:-1]))

    def deepest_first(self) -> Iterator[int]:
        """Every node, those of the last step first."""
        return (node for nodes in reversed(self.running) for node in nodes)
