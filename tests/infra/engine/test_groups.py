"""How rows are put together for attention: a long text must not cost the short ones."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.engine.blocks import blocks_for
from infra.engine.modules.strategy import _groups
from infra.engine.scheduler import Sequence, Slice

CPU = torch.device("cpu")


def decoding(position: int) -> Slice:
    """A text about to compute the row at ``position``."""
    tokens = position + 1
    table = list(range(1, blocks_for(tokens) + 1))
    return Slice(Sequence([7] * tokens, tokens, position, None, table=table), position, 1)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_padding_gathers_less_than_twice_the_blocks_there_are(positions: list[int]) -> None:
    groups = _groups([decoding(position) for position in positions], CPU)
    gathered = sum(group.tables.numel() for group in groups)
    assert gathered < 2 * sum(blocks_for(position + 1) for position in positions)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_every_row_attends_once(positions: list[int]) -> None:
    groups = _groups([decoding(position) for position in positions], CPU)
    rows = sorted(row for group in groups for row in group.rows.tolist())
    assert rows == list(range(len(positions)))
