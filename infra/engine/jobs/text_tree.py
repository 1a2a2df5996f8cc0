"""How texts branch off from each other, so that what several begin with is computed once."""

from bisect import bisect, bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from domain.ids import TokenId

Tokens = Sequence[TokenId]


@dataclass(eq=False)
class Branch:
    """A text that takes over the first ``at`` tokens of the one it branches off from.

    ``place`` is where it is among all texts. Others branch off from it, the latest last; the
    longest line of branches of branches of it has ``height`` of them.
    """

    place: int
    at: int
    branches: list["Branch"] = field(default_factory=list)
    height: int = 0

    def heir(self) -> "Branch":
        """The latest branch. The others can branch off from it as well, and from now on do."""
        heir = self.branches.pop()
        heir.branches = [*self.branches, *heir.branches]
        self.branches = []
        return heir


def branch_off(texts: Sequence[Tokens], starts: Sequence[int]) -> Branch:
    """The text that is computed first, with all others as branches of branches of it.

    Text ``i`` computes its tokens from ``starts[i] - 1`` on itself, whoever else does. Texts that
    start early come first, of these the long ones; each branches off from the one before it that
    computes the last token it takes over, so that little has to be waited for.
    """
    first, *others = sorted(range(len(texts)), key=lambda i: (starts[i], -len(texts[i])))
    root = Branch(first, 0)
    branches = {first: root}
    parents: dict[Branch, Branch] = {}
    known = [(texts[first], first)]  # in lexicographic order: neighbours have most in common
    for place in others:
        index = bisect_left(known, (texts[place], place))
        neighbours = known[max(0, index - 1) : index + 1]
        known.insert(index, (texts[place], place))
        common, nearest = max((_common(text, texts[place]), other) for text, other in neighbours)
        branch = branches[place] = Branch(place, min(common, starts[place] - 1))
        parent = branches[nearest]
        while parent is not root and parent.at >= branch.at:
            parent = parents[parent]
        parents[branch] = parent
    for branch, parent in reversed(parents.items()):
        parent.branches.append(branch)
        parent.height = max(parent.height, branch.height + 1)
    for branch in branches.values():
        branch.branches.sort(key=lambda each: (each.at, each.height))
    return root


def _common(one: Tokens, other: Tokens) -> int:
    """How many tokens both texts begin with."""
    ends = range(1, min(len(one), len(other)) + 1)
    return bisect(ends, False, key=lambda end: one[:end] != other[:end])
