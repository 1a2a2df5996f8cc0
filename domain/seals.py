"""Which events of a log are sealed."""

from domain.chain import Row
from domain.events import ERASED
from domain.log_errors import UnknownEvent


def check_seal(row: Row, *, erasable: bool) -> None:
    """Check that a row is sealed as rows of its log are.

    An erasable log has every event sealed but ``state_erased``; another one has neither.

    Raises:
        UnknownEvent: it is not.
    """
    erased = row.type == ERASED
    if not erasable and (row.sealed or erased):
        raise UnknownEvent(row.position, "sealed or erased, in a log that is not erasable")
    if erasable and row.sealed == erased:
        wrong = "sealed, although it says that its state was erased" if erased else "not sealed"
        raise UnknownEvent(row.position, f"{wrong}, in a log that is erasable")
