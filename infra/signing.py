"""Ed25519 keys in PEM files: checkpoints signed, and signatures checked."""

import logging
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from domain.merkle import Checkpoint, from_note, origin
from domain.note import key_id, signatures, text_of

_OTHERS: Final = 0o077
"""Permissions that a private key's file should give nobody."""

_log = logging.getLogger(__name__)


class BadKey(Exception):
    """A key that cannot be used; says why and what to do."""


class Ed25519Signer:
    """A private key under a name (``Signer``)."""

    def __init__(self, name: str, key: Ed25519PrivateKey) -> None:
        self._key = key
        public = key.public_key()
        self.name = name
        self.key_id = key_id(name, public.public_bytes_raw())
        self.public_key = public.public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        ).decode()

    def sign(self, text: bytes) -> bytes:
        """The signature over a text, 64 bytes (RFC 8032)."""
        return self._key.sign(text)


def read_key(path: Path) -> Ed25519PrivateKey:
    """A private key from a PEM file.

    Raises:
        BadKey: there is none, it is encrypted, or it is of another kind.
    """
    remedy = f"make one with: openssl genpkey -algorithm ed25519 -out {path}"
    try:
        data = path.read_bytes()
        others = path.stat().st_mode & _OTHERS
    except OSError as error:
        raise BadKey(f"the file cannot be read ({error.strerror}); {remedy}") from error
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as error:
        raise BadKey(
            "the key is encrypted, and there is nobody to ask for its password; decrypt it with:"
            f" openssl pkey -in {path} -out OTHER_FILE"
        ) from error
    except Exception as error:  # many kinds: what is in the file is anything
        raise BadKey(f"the file holds no private key in PEM; {remedy}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BadKey(f"the key is not an Ed25519 key; {remedy}")
    if others:
        _log.warning("other users may read the signing key %s: chmod 600 %s", path, path)
    return key


def verify_note(note: str, public_key: str) -> Checkpoint:
    """The checkpoint in a note that its log signed with the private key of ``public_key`` (PEM).

    Signatures of other keys are not looked at.

    Raises:
        BadKey: the public key is no Ed25519 key in PEM.
        ValueError: the note holds no checkpoint, is not signed by this key, or was changed.
    """
    key = _public_key(public_key)
    checkpoint = from_note(note)
    name = origin(checkpoint.log_id)
    known = key_id(name, key.public_bytes_raw())
    ours = [one for one in signatures(note) if (one.name, one.key_id) == (name, known)]
    if not ours:
        raise ValueError(f"the checkpoint has no signature of {name} by this key")
    for one in ours:
        try:
            key.verify(one.signature, text_of(note).encode())
        except InvalidSignature as error:
            raise ValueError(
                "the checkpoint is not what was signed: its text or its signature was changed"
            ) from error
    return checkpoint


def _public_key(pem: str) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(pem.encode())
    except Exception as error:  # many kinds: what is in the text is anything
        raise BadKey("this is no public key in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise BadKey("the public key is not an Ed25519 key")
    return key
