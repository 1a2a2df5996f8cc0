"""What states of an erasable log hold, sealed with a key of each state's own.

AES-256-GCM (NIST SP 800-38D) with a random 96-bit nonce for each record, bound to the log, the
state and the place in it: a record that was moved does not open. The chain covers the ciphertext,
so it holds when a key is gone. Stored text is ``{"sealed": base64 of nonce and ciphertext}``.
"""

import base64
import hmac
import os
import secrets
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from domain.canonical import as_json
from domain.chain import SEALED, Row
from domain.errors import LogUnavailable
from domain.events import ERASED
from domain.ids import StateId, Version
from domain.intents import GenerationStarted
from domain.ports import Idempotency
from infra.log.keyring import KEY_BYTES, Keyring, prepare

NONCE_BYTES: Final = 12
_KEYS_AT_HAND: Final = 4096
_PURPOSE: Final = "cacher-api3 sealed 1"


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    sealed: bytes


_sealed: Final = msgspec.json.Decoder(_Sealed)


def seal(key: bytes, plain: bytes, place: bytes) -> bytes:
    """A nonce and the ciphertext of a record that belongs to a place."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, place)


def unseal(key: bytes | None, sealed: bytes, place: bytes) -> bytes | None:
    """What a record holds; null without the key, or if it was changed or moved."""
    if key is None or len(sealed) < NONCE_BYTES:
        return None
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], place)
    except InvalidTag:
        return None


def seal_text(key: bytes, plain: str, place: bytes) -> str:
    """A sealed text, as it is stored."""
    encoded = base64.b64encode(seal(key, plain.encode(), place)).decode()
    return f'{SEALED}"{encoded}"}}'


def unseal_text(key: bytes | None, stored: str, place: bytes) -> str | None:
    """What a stored text holds; null as for :func:`unseal`."""
    try:
        plain = unseal(key, _sealed.decode(stored).sealed, place)
    except msgspec.DecodeError:
        return None
    return None if plain is None else plain.decode()


class Places:
    """What records of one log are bound to (the associated data of the cipher)."""

    def __init__(self, log_id: str) -> None:
        self._log_id = log_id

    def event(self, row: Row) -> bytes:
        """The place of an event's payload."""
        return self._place("event", row.state_id, row.version, row.at_version, row.type)

    def blob(self, state_id: StateId, version: Version | None, step: int) -> bytes:
        """The place of the logits at a step of an event."""
        return self._place("logits", state_id, version, step)

    def intent(self, state_id: StateId, base_version: Version) -> bytes:
        """The place of an intent."""
        return self._place("intent", state_id, base_version)

    def _place(self, what: str, *where: int | str | None) -> bytes:
        return as_json([_PURPOSE, self._log_id, what, *where]).encode()


class Opener:
    """Opens what is sealed in a log, as far as there are keys. For any thread.

    What the states held that are ``doomed`` stays shut, whether or not their keys are still there.
    """

    def __init__(self, log_id: str, keyring: Keyring) -> None:
        self._places = Places(log_id)
        self._keyring = keyring
        self.doomed: Set[StateId] = frozenset()

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Rows with what their payloads hold."""
        keys = self._keys({row.state_id for row in rows if row.sealed})
        return [self._row(row, keys.get(row.state_id)) if row.sealed else row for row in rows]

    def _keys(self, state_ids: Iterable[StateId]) -> dict[StateId, bytes]:
        found = self._keyring.find(state_ids)
        return {state_id: key for state_id, key in found.items() if state_id not in self.doomed}

    def _row(self, row: Row, key: bytes | None) -> Row:
        opened = unseal_text(key, row.payload, self._places.event(row))
        return msgspec.structs.replace(row, opened=opened)

    def blobs(
        self, state_id: StateId, version: Version | None, stored: Sequence[bytes]
    ) -> tuple[bytes, ...]:
        """The blobs kept beside an event, in order; one that does not open is left empty."""
        key = self._keys([state_id]).get(state_id)
        return tuple(
            unseal(key, data, self._places.blob(state_id, version, step)) or b""
            for step, data in enumerate(stored)
        )

    def intent(self, state_id: StateId, base_version: Version, stored: str) -> str | None:
        """What an intent holds."""
        key = self._keys([state_id]).get(state_id)
        return unseal_text(key, stored, self._places.intent(state_id, base_version))


class Plain:
    """How a log that is not erasable keeps things: as they are."""

    def begin(self) -> None:
        """A transaction begins."""

    def commit(self) -> None:
        """The transaction is about to be committed: what it needs must be on disk first."""

    def close(self) -> None:
        """The log is closed."""

    def opened(self, rows: Sequence[Row]) -> list[Row]:
        """Rows with what their payloads hold."""
        return list(rows)

    def row(self, row: Row) -> Row:
        """A row as it is to be stored."""
        return row

    def blob(self, row: Row, step: int, data: bytes) -> bytes:
        """A blob as it is to be stored beside an event."""
        return data

    def intent(self, started: GenerationStarted) -> str:
        """An intent as it is to be stored."""
        return as_json(started)

    def digest(self, request_digest: bytes) -> bytes:
        """The digest of a request as it is to be stored."""
        return request_digest

    def recognised(self, stored: bytes, asked: Idempotency) -> bytes:
        """The digest of the request that a stored one is of, as far as it can be told."""
        same = hmac.compare_digest(stored, self.digest(asked.request_digest))
        return asked.request_digest if same else stored


PLAIN: Final = Plain()


class Sealer(Plain):
    """How an erasable log keeps things. All but digests for the thread that writes it.

    Digests are keyed (HMAC with SHA-256, RFC 2104), since whoever guesses a request could
    otherwise tell that it was made. ``doomed`` are states that are erased and whose keys may still
    be there.
    """

    def __init__(self, log_id: str, keyring: Keyring) -> None:
        self.keyring = keyring
        self.doomed: set[StateId] = set()
        self._places = Places(log_id)
        self._opener = Opener(log_id, keyring)
        self._opener.doomed = self.doomed
        self._fresh: dict[StateId, bytes] = {}
        self._at_hand: dict[StateId, bytes] = {}

    def begin(self) -> None:
        """Forget keys that an earlier transaction made and did not come to need."""
        self._fresh = {}

    def commit(self) -> None:
        """Have the keys of new states on disk."""
        if self._fresh:
            self.keyring.add(self._fresh)
            self._fresh = {}

    def find(self, state_ids: Iterable[StateId]) -> Iterable[StateId]:
        """Those of these states that have a key."""
        return self.keyring.find(state_ids)

    def doom(self, state_ids: Iterable[StateId]) -> None:
        """Use the keys of states no more."""
        for state_id in state_ids:
            self.doomed.add(state_id)
            self._at_hand.pop(state_id, None)

    def destroy(self) -> None:
        """Destroy the keys of the doomed states on disk."""
        self.keyring.destroy(self.doomed)

    def close(self) -> None:
        """Close the file of the keys."""
        self.keyring.close()

    def opened(self, rows: Sequence[Row]) -> list[Row]:
        """Rows with what their payloads hold."""
        return self._opener.rows(rows)

    def row(self, row: Row) -> Row:
        """A row as it is to be stored; the first one of a state has a key made for it.

        Raises:
            LogUnavailable: there is no key to the state.
        """
        if row.sealed or row.type == ERASED:
            return row
        key = self._key(row.state_id, new=row.version == 1)
        sealed = seal_text(key, row.payload, self._places.event(row))
        return msgspec.structs.replace(row, payload=sealed, opened=row.payload)

    def blob(self, row: Row, step: int, data: bytes) -> bytes:
        """A blob as it is to be stored beside an event."""
        return seal(
            self._key(row.state_id), data, self._places.blob(row.state_id, row.version, step)
        )

    def intent(self, started: GenerationStarted) -> str:
        """An intent as it is to be stored.

        Raises:
            LogUnavailable: there is no key to the state.
        """
        place = self._places.intent(started.state_id, started.base_version)
        return seal_text(self._key(started.state_id), as_json(started), place)

    def digest(self, request_digest: bytes) -> bytes:
        """The digest of a request as it is to be stored."""
        return hmac.digest(self.keyring.secret, request_digest, "sha256")

    def _key(self, state_id: StateId, *, new: bool = False) -> bytes:
        if key := self._fresh.get(state_id) or self._at_hand.get(state_id):
            return key
        found = {} if state_id in self.doomed else self.keyring.find([state_id])
        if key := found.get(state_id):
            if len(self._at_hand) >= _KEYS_AT_HAND:
                self._at_hand.clear()
            self._at_hand[state_id] = key
        elif new:
            key = self._fresh[state_id] = secrets.token_bytes(KEY_BYTES)
        else:
            raise LogUnavailable(f"there is no key to state {state_id!r}: nothing was recorded")
        return key


def open_sealer(database: Path, *, erasable: bool) -> Plain:
    """How a log keeps things, for its writer; see :func:`infra.log.keyring.prepare`."""
    log_id = prepare(database, erasable=erasable)
    return (
        PLAIN if log_id is None else Sealer(log_id, Keyring.open(database, log_id, writable=True))
    )
