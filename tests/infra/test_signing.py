"""Keys as openssl makes them; notes as other implementations sign them; nothing else passes."""

import base64
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from domain.ids import Position
from domain.merkle import Checkpoint, origin, to_note
from domain.note import Signature, key_id, signatures, text_of, with_signature
from infra.signing import BadKey, Ed25519Signer, read_key, verify_note

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")

CHECKPOINT = Checkpoint(
    log_id="a-log", size=2, position=Position(5), hash="0c" * 32, root="49" * 32
)
NAME = origin("a-log")
NOTICED = r"signature|no checkpoint"

# Key and note of the documentation of golang.org/x/mod/sumdb/note, key of sum.golang.org.
GO_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_NOTE = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
    "\n"
    "\u2014 PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngo"
    "tpRZb6KE6RyyBwJnAM=\n"
)
SUM_KEY = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_key(path: Path, algorithm: str = "ed25519", *more: str) -> Path:
    openssl("genpkey", "-algorithm", algorithm, *more, "-out", path)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("key") / "signing.pem")


@pytest.fixture(scope="module")
def signer(key_file: Path) -> Ed25519Signer:
    return Ed25519Signer(NAME, read_key(key_file))


def signed(signer: Ed25519Signer, note: str, name: str | None = None) -> str:
    signature = signer.sign(text_of(note).encode())
    return with_signature(note, Signature(name or signer.name, signer.key_id, signature))


@pytest.fixture(scope="module")
def note(signer: Ed25519Signer) -> str:
    return signed(signer, to_note(CHECKPOINT))


def test_a_signed_note_holds_what_was_signed(signer: Ed25519Signer, note: str) -> None:
    assert verify_note(note, signer.public_key) == CHECKPOINT


def test_openssl_agrees_on_the_public_key_and_the_signature(
    key_file: Path, signer: Ed25519Signer, note: str, tmp_path: Path
) -> None:
    public, text, signature = (tmp_path / name for name in ("public.pem", "text", "signature"))
    openssl("pkey", "-in", key_file, "-pubout", "-out", public)
    assert public.read_text() == signer.public_key
    text.write_text(text_of(note))
    signature.write_bytes(signatures(note)[0].signature)
    check = ("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", text)
    openssl(*check, "-sigfile", signature)
    text.write_text(note)
    with pytest.raises(subprocess.CalledProcessError):
        openssl(*check, "-sigfile", signature)


@pytest.mark.parametrize("vkey", [GO_KEY, SUM_KEY])
def test_key_ids_are_those_of_other_implementations(vkey: str) -> None:
    name, number, key = vkey.split("+", 2)
    assert key_id(name, base64.b64decode(key)[1:]).hex() == number


def test_a_note_that_another_implementation_signed_is_read_as_it_was_meant() -> None:
    name, number, key = GO_KEY.split("+", 2)
    (found,) = signatures(GO_NOTE)
    assert (found.name, found.key_id.hex()) == (name, number)
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(key)[1:])
    public.verify(found.signature, text_of(GO_NOTE).encode())
    assert with_signature(text_of(GO_NOTE) + "\n", found) == GO_NOTE


def test_any_changed_bit_is_noticed(signer: Ed25519Signer, note: str) -> None:
    data = note.encode()
    for at, byte in enumerate(data):
        for bit in range(8):
            changed = data[:at] + bytes([byte ^ 1 << bit]) + data[at + 1 :]
            with pytest.raises(ValueError, match=NOTICED):
                verify_note(changed.decode(errors="replace"), signer.public_key)


def test_any_missing_byte_of_the_text_or_signature_is_noticed(
    signer: Ed25519Signer, note: str
) -> None:
    for at in range(len(note) - 1):
        with pytest.raises(ValueError, match=NOTICED):
            verify_note(note[:at] + note[at + 1 :], signer.public_key)
    assert verify_note(note[:-1], signer.public_key) == CHECKPOINT


def test_a_note_may_have_signatures_of_others(
    signer: Ed25519Signer, note: str, tmp_path: Path
) -> None:
    witness = Ed25519Signer("witness.example", read_key(make_key(tmp_path / "witness.pem")))
    both = signed(witness, note)
    assert [one.name for one in signatures(both)] == [NAME, "witness.example"]
    assert verify_note(both, signer.public_key) == CHECKPOINT
    with pytest.raises(ValueError, match="no signature of cacher/a-log by this key"):
        verify_note(both, witness.public_key)


def test_a_note_without_a_signature_is_refused(signer: Ed25519Signer) -> None:
    with pytest.raises(ValueError, match="no signature of cacher/a-log by this key"):
        verify_note(to_note(CHECKPOINT), signer.public_key)


def test_one_bad_signature_under_a_good_one_refuses_the_note(
    signer: Ed25519Signer, note: str
) -> None:
    bad = with_signature(note, Signature(NAME, signer.key_id, bytes(64)))
    with pytest.raises(ValueError, match="its text or its signature was changed"):
        verify_note(bad, signer.public_key)


@pytest.mark.parametrize(
    "line", ["", "\u2014 name AAAA", "\u2014 name", "- name AAAABBBB", "\u2014 a b AAAABBBB"]
)
def test_a_line_that_is_no_signature_is_refused(
    signer: Ed25519Signer, note: str, line: str
) -> None:
    with pytest.raises(ValueError, match=NOTICED):
        verify_note(f"{note}{line}\n", signer.public_key)


def test_a_key_that_is_none_is_refused_with_what_to_do(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    encrypted = make_key(tmp_path / "encrypted.pem", "ed25519", "-aes-256-cbc", "-pass", "pass:x")
    other = make_key(tmp_path / "x25519.pem", "x25519")
    rsa = make_key(tmp_path / "rsa.pem", "rsa", "-pkeyopt", "rsa_keygen_bits:1024")
    for path, why, remedy in (
        (tmp_path / "missing.pem", "No such file", "openssl genpkey -algorithm ed25519"),
        (tmp_path, "Is a directory", "openssl genpkey"),
        (garbage, "holds no private key in PEM", "openssl genpkey"),
        (encrypted, "is encrypted", f"openssl pkey -in {encrypted}"),
        (other, "is not an Ed25519 key", "openssl genpkey"),
        (rsa, "is not an Ed25519 key", "openssl genpkey"),
    ):
        with pytest.raises(BadKey) as refused:
            read_key(path)
        assert why in str(refused.value)
        assert remedy in str(refused.value)


def test_a_key_that_others_may_read_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_key(tmp_path / "open.pem")
    with caplog.at_level(logging.WARNING):
        read_key(path)
        assert caplog.messages == []
        path.chmod(0o640)
        read_key(path)
    assert caplog.messages == [f"other users may read the signing key {path}: chmod 600 {path}"]


def test_a_public_key_that_is_none_is_refused(note: str, tmp_path: Path) -> None:
    public = tmp_path / "public.pem"
    openssl("pkey", "-in", make_key(tmp_path / "x.pem", "x25519"), "-pubout", "-out", public)
    for pem, why in (("", "no public key in PEM"), (public.read_text(), "not an Ed25519 key")):
        with pytest.raises(BadKey, match=why):
            verify_note(note, pem)
