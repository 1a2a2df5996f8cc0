"""The order in which texts are computed so that what they share is computed once."""

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from domain.ids import TokenId
from infra.engine.jobs.text_tree import Branch, branch_off

Text = tuple[TokenId, ...]
Asked = list[tuple[Text, int]]


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    """Texts that have much in common, some all of it, and where each is scored from."""
    token = st.sampled_from([TokenId(1), TokenId(2)])
    texts = draw(st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=12))
    return [(tuple(text), draw(st.integers(1, len(text)))) for text in texts]


def tree(asked: Asked) -> Branch:
    return branch_off([text for text, _ in asked], [start for _, start in asked])


def walk(root: Branch) -> list[Branch]:
    return [root, *(each for branch in root.branches for each in walk(branch))]


@settings(max_examples=150)
@given(asked())
def test_a_token_is_computed_once_or_by_those_who_want_its_logits(asked: Asked) -> None:
    computing = defaultdict(list)
    for branch in walk(tree(asked)):
        text, start = asked[branch.place]
        for end in range(branch.at + 1, len(text) + 1):
            computing[text[:end]].append(end >= start)
    assert computing.keys() == {text[:end] for text, _ in asked for end in range(1, len(text) + 1)}
    assert all(len(wanted) == 1 or all(wanted) for wanted in computing.values())


@settings(max_examples=150)
@given(asked())
def test_a_text_branches_off_from_one_that_computes_the_last_token_it_takes_over(
    asked: Asked,
) -> None:
    root = tree(asked)
    for parent in walk(root):
        for branch in parent.branches:
            text, start = asked[branch.place]
            assert asked[parent.place][0][: branch.at] == text[: branch.at]
            assert branch.at < start
            assert branch.at > parent.at or parent is root
    assert sorted(branch.place for branch in walk(root)) == list(range(len(asked)))


@settings(max_examples=150)
@given(asked())
def test_one_place_is_enough_since_an_heir_holds_what_all_others_take_over(asked: Asked) -> None:
    branch = tree(asked)
    line = [branch.place]
    while branch.branches:
        branch = branch.heir()
        line.append(branch.place)
        assert [each.at for each in branch.branches] == sorted(each.at for each in branch.branches)
        for other in branch.branches:
            held = asked[branch.place][0][: other.at]
            assert held == asked[other.place][0][: other.at]
    assert sorted(line) == list(range(len(asked)))


def test_long_texts_come_first_so_that_lines_are_short() -> None:
    whole = tuple(map(TokenId, range(20)))
    asked = [((*whole[:end], TokenId(99)), end + 1) for end in (4, 8, 12, 16)]
    root = tree([*asked, (whole, 4)])
    assert (root.place, root.height) == (4, 1)
    assert [(branch.place, branch.at) for branch in root.branches] == list(
        enumerate((4, 8, 12, 16))
    )
    assert {branch.height for branch in root.branches} == {0}


def test_a_line_is_as_high_as_texts_wait_for_each_other() -> None:
    texts = [(1, 1, 1), (1, 2, 1, 1), (1, 2, 2, 1, 1), (1, 2, 2, 2, 1, 1)]
    root = branch_off([tuple(map(TokenId, text)) for text in texts], [1, 2, 3, 4])
    assert [branch.place for branch in walk(root)] == [0, 1, 2, 3]
    assert [branch.height for branch in walk(root)] == [3, 2, 1, 0]
