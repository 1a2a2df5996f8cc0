"""What leaves a log in a file, and what another log takes in."""

from msgspec import Struct

from domain.chain import Row
from domain.fingerprint import Fingerprint
from domain.ids import Position


class Source(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an imported event was recorded first, and what its row said of that.

    With these and its other columns, which are kept, the row it had there can be made again, hash
    and all. Hashes are hexadecimal.
    """

    log_id: str
    position: Position
    previous_hash: str
    hash: str
    recorded_at: str
    actor: str
    request_id: str


class Imported(Struct, frozen=True, kw_only=True):
    """An event as another log has it, with what is kept beside it there.

    ``row`` is the original one; its payload is stored as it is. ``source`` says where it is from.
    """

    row: Row
    source: Source
    fingerprint: Fingerprint | None
    logits: tuple[bytes, ...]
