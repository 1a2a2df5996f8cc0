"""The identity of the numerics a result was computed under."""

import hashlib
from typing import Any

import msgspec
from msgspec import Struct

from domain.canonical import as_json


class Fingerprint(Struct, frozen=True, kw_only=True):
    """Identity of the numerics a result was computed under.

    ``id`` is the SHA-256 (hexadecimal) of ``document``, which names everything the bits depend
    on. Results under equal fingerprints are equal bit for bit if ``deterministic``.
    """

    id: str
    document: str
    deterministic: bool

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Fingerprint":
        """The fingerprint that names these facts; ``deterministic`` is one of them."""
        document = as_json(facts)
        return cls(
            id=hashlib.sha256(document.encode()).hexdigest(),
            document=document,
            deterministic=facts["deterministic"],
        )

    def facts(self) -> dict[str, Any]:
        """What the document names."""
        return msgspec.json.decode(self.document, type=dict[str, Any])

    def is_sound(self) -> bool:
        """Whether the id is that of the document, and the claim the one the document makes."""
        digest = hashlib.sha256(self.document.encode()).hexdigest()
        try:
            claimed = self.facts().get("deterministic")
        except msgspec.DecodeError:
            return False
        return digest == self.id and claimed is self.deterministic
