"""Text to tokens and back, exactly: every token is a run of bytes, a text is their UTF-8."""

import codecs
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, Final

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from domain.content import Fragment
from domain.ids import TokenId

_LONGEST_CHARACTER: Final = 4
"""Bytes of UTF-8: whether a character is complete shows in so many."""
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")


class UnsupportedTokenizer(Exception):
    """A tokenizer whose tokens are not runs of bytes."""


class Tokenizer:
    """A fast tokenizer of transformers, with the exact bytes of each of its tokens.

    Text is taken literally: the names of special tokens in it are ordinary text. Special tokens
    have no bytes and so add nothing to a text.
    """

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self._fast = fast
        self._bytes = _token_bytes(fast)
        self._partial = {token: raw for token, raw in self._bytes.items() if not _is_text(raw)}
        self.longest_token_bytes = max(map(len, self._bytes.values()))
        self.bos_token_id: TokenId | None = fast.bos_token_id
        self.eos_token_id: TokenId | None = fast.eos_token_id
        self.digest = hashlib.sha256(fast.backend_tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str, *, beginning: bool) -> tuple[TokenId, ...]:
        """Tokens of ``text``; at the beginning with the special tokens the model expects."""
        ids = self._fast.encode(
            text, add_special_tokens=beginning, split_special_tokens=True, verbose=False
        )
        return tuple(map(TokenId, ids))

    def fragment(self, before: Sequence[TokenId], tokens: Sequence[TokenId]) -> Fragment:
        """``tokens`` with the text each of them adds after ``before``."""
        decoder = self.decoder(before)
        return Fragment.of(
            tokens, [decoder.push(token) for token in tokens], list(map(self.partial, tokens))
        )

    def partial(self, token: TokenId) -> bytes | None:
        """The bytes of a token that is not whole characters by itself; null of any other."""
        return self._partial.get(token)

    def text_of(self, token: TokenId) -> str:
        """A token on its own, as far as it is valid UTF-8."""
        return self._bytes.get(token, b"").decode(errors="replace")

    def decoder(self, before: Sequence[TokenId]) -> "TextDecoder":
        """A decoder that stands at the end of ``before``, of which the last bytes alone matter."""
        start, held = len(before), 0
        while start and held < _LONGEST_CHARACTER:
            start -= 1
            held += len(self._bytes.get(before[start], b""))
        decoder = TextDecoder(self._bytes)
        for token in before[start:]:
            decoder.push(token)
        return decoder


class TextDecoder:
    """Decodes token by token; what a token adds never depends on tokens after it.

    A token that ends inside a character adds nothing, the one that completes it adds all of it.
    Bytes that can never be a character become U+FFFD, as in :func:`codecs.decode`.
    """

    def __init__(self, token_bytes: dict[int, bytes]) -> None:
        self._bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: TokenId) -> str:
        """The text that ``token`` adds."""
        return self._utf8.decode(self._bytes.get(token, b""))


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _token_bytes(fast: PreTrainedTokenizerFast) -> dict[int, bytes]:
    description: dict[str, Any] = json.loads(fast.backend_tokenizer.to_str())
    kinds = _decoder_kinds(description.get("decoder"))
    if description["model"]["type"] != "BPE":  # others would read the names of special tokens
        raise UnsupportedTokenizer(f"its model is {description['model']['type']}, needed is BPE")
    if not description["model"]["vocab"]:  # what transformers makes of a folder without its files
        raise UnsupportedTokenizer("its tokenizer has no vocabulary")
    if "ByteLevel" in kinds:
        alphabet = {char: byte for byte, char in bytes_to_unicode().items()}

        def to_bytes(token: str) -> bytes:
            return bytes(alphabet[char] for char in token)

    elif kinds & {"Metaspace", "ByteFallback"}:

        def to_bytes(token: str) -> bytes:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()

    else:
        raise UnsupportedTokenizer(
            f"its decoder is {sorted(kinds) or None}, needed is ByteLevel, Metaspace or"
            " ByteFallback"
        )
    table = {
        added["id"]: b"" if added["special"] else added["content"].encode()
        for added in description.get("added_tokens", ())
    }
    for token, token_id in description["model"]["vocab"].items():
        if token_id not in table:
            table[token_id] = to_bytes(token)
    return table


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_decoder_kinds, decoder.get("decoders", ())))
