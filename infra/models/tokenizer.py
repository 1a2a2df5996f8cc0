"""Text to tokens and back: every token is a run of bytes, a text is their UTF-8."""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from msgspec import UNSET
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from domain.content import Fragment, ToldToken
from domain.errors import TooLarge, invalid
from domain.ids import TokenId

_LONGEST_CHARACTER: Final = 4
"""Bytes of UTF-8: whether a character is complete shows in so many."""
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")


class UnsupportedTokenizer(Exception):
    """A tokenizer whose tokens are not runs of bytes."""


class Tokenizer:
    """A fast tokenizer of transformers, with the bytes of each of its tokens.

    Text is taken literally: the names of special tokens in it are ordinary text, or refused where
    the tokenizer would read them all the same. Special tokens have no bytes and so add nothing to a
    text.

    The text comes back exactly, unless the tokenizer may be ``lossy`` and is: it may put letters in
    lower case, or leave out what it does not know. ``opening`` and ``closing`` are the special
    tokens that it puts around a text.
    """

    def __init__(self, fast: PreTrainedTokenizerFast, *, lossy: bool = False) -> None:
        description: dict[str, Any] = json.loads(fast.backend_tokenizer.to_str())
        kind = description["model"]["type"]
        self._exact = kind == "BPE"  # others would read the names of special tokens
        if not self._exact and not lossy:
            raise UnsupportedTokenizer(f"its model is {kind}, needed is BPE")
        self._fast = fast
        self._bytes = _token_bytes(description)
        self._partial = {token: raw for token, raw in self._bytes.items() if not _is_text(raw)}
        self.longest_token_bytes = max(map(len, self._bytes.values()))
        self.bos_token_id: TokenId | None = fast.bos_token_id
        self.eos_token_id: TokenId | None = fast.eos_token_id
        self.digest = hashlib.sha256(fast.backend_tokenizer.to_str().encode()).hexdigest()
        ids, added = self._encode("a", beginning=True)
        inside = [place for place, is_added in enumerate(added) if not is_added] or [len(ids)]
        self.opening = tuple(ids[: inside[0]])
        self.closing = tuple(ids[inside[-1] + 1 :])

    def encode(self, text: str, *, beginning: bool) -> tuple[TokenId, ...]:
        """Tokens of ``text``; at the beginning with the special tokens the model expects.

        Raises:
            InvalidInput: the name of a special token in it would be read as that token.
        """
        ids, added = self._encode(text, beginning=beginning)
        if not self._exact:
            self._check_literal(ids, added)
        return tuple(ids)

    def enclosed(self, tokens: Sequence[TokenId]) -> tuple[TokenId, ...]:
        """Tokens of a text with the special ones around it, where they are not there already."""
        whole = tuple(tokens)
        if whole[: len(self.opening)] != self.opening:
            whole = self.opening + whole
        if whole[len(whole) - len(self.closing) :] != self.closing:
            whole += self.closing
        return whole

    def check_fits(self, text: str, room: int) -> None:
        """Refuse a text that cannot be ``room`` tokens or fewer, without encoding it.

        Raises:
            TooLarge: it cannot; what a lossy tokenizer leaves out is not known before.
        """
        size = len(text.encode())
        if self._exact and size > room * self.longest_token_bytes:
            raise TooLarge(f"a text of {size} bytes does not fit into {room} tokens", room=room)

    def _encode(self, text: str, *, beginning: bool) -> tuple[list[TokenId], list[int]]:
        """Tokens of a text, and of each whether it was put around the text."""
        encoded = self._fast(
            text,
            add_special_tokens=beginning,
            split_special_tokens=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        return encoded["input_ids"], encoded["special_tokens_mask"]

    def _check_literal(self, ids: Sequence[TokenId], added: Sequence[int]) -> None:
        known = {*self._fast.all_special_ids} - {self._fast.unk_token_id}
        for token, is_added in zip(ids, added, strict=True):
            if token in known and not is_added:
                name = self._fast.convert_ids_to_tokens(token)
                raise invalid("text", f"names {name}, which this tokenizer cannot read as text")

    def fragment(self, before: Sequence[TokenId], tokens: Sequence[TokenId]) -> Fragment:
        """``tokens`` with the text each of them adds after ``before``."""
        decoder = self.decoder(before)
        return Fragment.of(
            tokens, [decoder.push(token) for token in tokens], list(map(self.partial, tokens))
        )

    def told(self, before: Sequence[TokenId], tokens: Iterable[TokenId]) -> list[ToldToken]:
        """Each of ``tokens`` with the text that it would add, by itself, after ``before``."""
        decoder, partial = self.decoder(before), self._partial
        return [
            ToldToken(
                token_id=token,
                text=decoder.peek(token),
                bytes=tuple(partial[token]) if token in partial else UNSET,
            )
            for token in tokens
        ]

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

    def peek(self, token: TokenId) -> str:
        """The text that ``token`` would add; nothing is pushed."""
        state = self._utf8.getstate()
        text = self.push(token)
        self._utf8.setstate(state)
        return text


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _token_bytes(description: dict[str, Any]) -> dict[int, bytes]:
    model, kinds = description["model"], _decoder_kinds(description.get("decoder"))
    if not model["vocab"]:  # what transformers makes of a folder without its files
        raise UnsupportedTokenizer("its tokenizer has no vocabulary")
    if model["type"] == "WordPiece":

        def to_bytes(token: str) -> bytes:
            inside = token.removeprefix(model["continuing_subword_prefix"])
            return inside.encode() if inside != token else f" {token}".encode()

    elif "ByteLevel" in kinds:
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
    for token, token_id in _vocabulary(model):
        if token_id not in table:
            table[token_id] = to_bytes(token)
    return table


def _vocabulary(model: dict[str, Any]) -> Iterable[tuple[str, int]]:
    """The tokens of a tokenizer's model with their ids."""
    if model["type"] == "Unigram":
        return ((token, token_id) for token_id, (token, _) in enumerate(model["vocab"]))
    vocabulary: dict[str, int] = model["vocab"]
    return vocabulary.items()


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_decoder_kinds, decoder.get("decoders", ())))
