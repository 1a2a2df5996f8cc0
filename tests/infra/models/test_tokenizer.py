"""Text to tokens and back: nothing is lost, whatever the text and wherever it is cut."""

import json
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from domain.content import ToldToken
from domain.errors import InvalidInput, TooLarge
from domain.ids import TokenId
from infra.models.tokenizer import Tokenizer, UnsupportedTokenizer
from tests.infra.engine.small_models import embedded

END = "<|endoftext|>"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
COMBINING = "e\u0301 \u1ea5 \u0928\u093f"
CHINESE = "\u5f88\u4e45\u4ee5\u524d"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
token_lists = st.lists(st.integers(0, 1023).map(TokenId), max_size=40)


@cache
def tiny() -> Tokenizer:
    return Tokenizer(AutoTokenizer.from_pretrained(embedded()))


def wrapped(backend: Backend, **special: str) -> Tokenizer:
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **special))


@settings(max_examples=300, deadline=None)
@given(texts, st.booleans())
@example(f"a {END} b{END}", True)
@example(f"{FAMILY} {COMBINING} {CHINESE}", False)
@example(" \t\n\r\u00a0\u2028\x00\x7f\ufeff\ufffd", True)
@example("\u2581 \u0120 <0x0A>", False)
def test_any_unicode_text_comes_back_exactly(text: str, beginning: bool) -> None:
    tokens = tiny().encode(text, beginning=beginning)
    assert tiny().fragment([], tokens).text == text
    assert all(0 <= token < 1024 for token in tokens)


@settings(deadline=None)
@given(texts, texts)
def test_texts_encoded_one_after_the_other_are_one_text(first: str, second: str) -> None:
    before = tiny().encode(first, beginning=True)
    after = tiny().encode(second, beginning=False)
    assert tiny().fragment([], before + after).text == first + second
    assert tiny().fragment(before, after).text == second


@given(token_lists)
def test_the_pieces_of_any_tokens_are_its_text(tokens: list[TokenId]) -> None:
    fragment = tiny().fragment([], tokens)
    assert "".join(fragment.pieces()) == fragment.text
    assert len(fragment.pieces()) == len(fragment.tokens) == len(tokens)


@given(token_lists, st.lists(st.integers(0, 40), max_size=4))
def test_where_tokens_are_cut_changes_no_text(tokens: list[TokenId], cuts: list[int]) -> None:
    whole = tiny().fragment([], tokens)
    edges = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    parts = [tiny().fragment(tokens[:a], tokens[a:b]) for a, b in pairwise(edges)]
    assert [piece for part in parts for piece in part.pieces()] == list(whole.pieces())


@given(token_lists, token_lists)
def test_each_of_several_tokens_is_told_as_if_it_alone_came_next(
    before: list[TokenId], tokens: list[TokenId]
) -> None:
    alone = [ToldToken.of(tiny().fragment(before, (token,))) for token in tokens]
    assert tiny().told(before, tokens) == alone


def test_what_is_told_of_a_token_depends_on_the_character_that_has_begun() -> None:
    *begun, last = tiny().encode("\U0001f9c0", beginning=False)
    after, alone = (tiny().told(before, [last, last])[1] for before in (begun, []))
    assert (after.text, alone.text) == ("\U0001f9c0", "\ufffd")
    assert after.bytes == alone.bytes != UNSET


@pytest.mark.parametrize("text", [FAMILY, CHINESE, COMBINING, "\U0001f9c0"])
def test_a_character_over_several_tokens_appears_with_its_last(text: str) -> None:
    tokens = tiny().encode(text, beginning=False)
    assert len(tokens) > len(text)
    pieces = tiny().fragment([], tokens).pieces()
    assert [piece for piece in pieces if piece] == list(text)
    decoder = tiny().decoder(tokens[:2])
    assert [decoder.push(token) for token in tokens[2:]] == list(pieces[2:])


def test_bytes_that_can_never_be_a_character_are_replaced_once_that_is_known() -> None:
    first, *_ = tiny().encode("\U0001f9c0", beginning=False)
    assert tiny().text_of(first) == "\ufffd"
    (letter,) = tiny().encode("a", beginning=False)
    assert tiny().fragment([], [first, letter, letter]).pieces() == ("", "\ufffda", "a")


def test_the_name_of_a_special_token_is_ordinary_text() -> None:
    tokens = tiny().encode(END, beginning=True)
    assert len(tokens) > 1
    assert tiny().eos_token_id not in tokens
    assert tiny().fragment([], tokens).text == END


def test_special_tokens_add_nothing_to_a_text() -> None:
    end = tiny().eos_token_id
    assert end == 0
    assert tiny().text_of(end) == ""
    a, b = tiny().encode("a", beginning=False) + tiny().encode("b", beginning=False)
    assert tiny().fragment([], [end, a, end, b, end]).pieces() == ("", "a", "", "b", "")


def test_a_token_outside_the_vocabulary_adds_nothing() -> None:
    assert tiny().fragment([], [TokenId(1023), TokenId(50_000)]).pieces()[1] == ""


def test_the_longest_token_bounds_how_short_a_text_can_become() -> None:
    text = "Once upon a time, a young boy lived on a sunny farm. " * 20
    assert len(text) <= len(tiny().encode(text, beginning=False)) * tiny().longest_token_bytes


def with_byte_fallback(*, space: str = "never") -> Backend:
    """As llama-like models have it: words begin with U+2581, unknown characters are bytes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["\u2581", "h", "i", "\u2581h", "\u2581hi"]
    merges = [("\u2581", "h"), ("\u2581h", "i")]
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@settings(max_examples=100, deadline=None)
@given(texts.filter(lambda text: "\u2581" not in text))
@example("hi hi")
@example(f"hi {FAMILY}</s><0x0A>\n")
def test_a_byte_fallback_tokenizer_round_trips_too(text: str) -> None:
    tokenizer = wrapped(with_byte_fallback(), unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokens = tokenizer.encode(text, beginning=False)
    assert tokenizer.fragment([], tokens).text == text
    assert not {0, 1, 2} & set(tokens)


def test_byte_tokens_and_words_have_the_bytes_they_stand_for() -> None:
    tokenizer = wrapped(with_byte_fallback(), eos_token="</s>")
    assert tokenizer.encode("hi hi", beginning=False) == (260, 261, 263)
    euro = [TokenId(3 + byte) for byte in "\u20ac".encode()]
    assert tokenizer.fragment([], [TokenId(263), *euro]).pieces() == (" hi", "", "", "\u20ac")
    assert tokenizer.eos_token_id == 2
    assert tokenizer.bos_token_id is None


def byte_level(*special: str) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=list(special), initial_alphabet=alphabet
    )
    backend.train_from_iterator(["hello"] * 3, trainer)
    return backend


def test_special_tokens_may_have_any_name() -> None:
    name = "<\uff5cend of\u2581text\uff5c>"  # characters that stand for no byte
    tokenizer = wrapped(byte_level(name), eos_token=name)
    tokens = tokenizer.encode(f"hello{name}", beginning=True)
    assert 0 not in tokens
    assert tokenizer.fragment([], [TokenId(0), *tokens]).text == f"hello{name}"


def test_added_tokens_that_are_not_special_are_text() -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer = wrapped(backend)
    tokens = tokenizer.encode("hello<tool>\u00e4", beginning=False)
    assert len(backend.encode("<tool>").ids) == 1
    assert backend.token_to_id("<tool>") in tokens
    assert tokenizer.fragment([], tokens).text == "hello<tool>\u00e4"


def test_special_tokens_are_added_at_the_beginning_only() -> None:
    backend = byte_level("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = wrapped(backend, bos_token="<s>")
    tokens = tokenizer.encode("hello", beginning=False)
    assert tokenizer.encode("hello", beginning=True) == (0, *tokens)
    assert tokenizer.fragment([], (TokenId(0), *tokens)).text == "hello"


def word_piece() -> Backend:
    backend = Backend(models.WordPiece({"[UNK]": 0, "hi": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return backend


def unigram() -> Backend:
    backend = Backend(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("h", -1.0)], unk_id=0))
    backend.decoder = decoders.Metaspace()
    return backend


def without_decoder() -> Backend:
    backend = byte_level()
    description = json.loads(backend.to_str())
    description["decoder"] = None
    return Backend.from_str(json.dumps(description))


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (word_piece, "its model is WordPiece, needed is BPE"),
        (unigram, "its model is Unigram, needed is BPE"),
        (without_decoder, "its decoder is None, needed is ByteLevel"),
    ],
)
def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused(backend: object, reason: str) -> None:
    with pytest.raises(UnsupportedTokenizer, match=reason):
        wrapped(backend())  # type: ignore[operator]


def test_the_digest_names_the_whole_tokenizer() -> None:
    same = {wrapped(with_byte_fallback()).digest for _ in range(2)}
    assert len(same) == 1
    lowercase = with_byte_fallback()
    lowercase.normalizer = normalizers.Lowercase()
    assert {
        wrapped(lowercase).digest,
        wrapped(with_byte_fallback(space="first")).digest,
    } & same == (set())


def word_pieces() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "dog", "##gy", "[", "]", "sep", "!"]
    backend = Backend(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return lossy(backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def unigram() -> Tokenizer:
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581the", -1.0), ("\u2581", -2.0)]
    backend = Backend(models.Unigram([*pieces, ("dog", -1.0), ("s", -2.0)], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return lossy(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def lossy(backend: Backend, **special: str) -> Tokenizer:
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    with pytest.raises(UnsupportedTokenizer, match="needed is BPE"):
        Tokenizer(fast)
    return Tokenizer(fast, lossy=True)


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [(word_pieces(), "The  DOGGY dog!", " the doggy dog !"), (unigram(), "the dogs", " the dogs")],
)
def test_a_lossy_tokenizer_says_what_its_tokens_say(
    tokenizer: Tokenizer, text: str, expected: str
) -> None:
    tokens = tokenizer.encode(text, beginning=True)
    assert tokenizer.fragment([], tokens).text == expected
    assert tokenizer.enclosed(tokenizer.encode(text, beginning=False)) == tokens


def test_special_tokens_are_put_around_a_text_once() -> None:
    opening, closing = word_pieces().opening, word_pieces().closing
    assert (opening, closing) == ((1,), (2,))
    whole = (1, 3, 4, 2)
    for tokens in ((3, 4), (1, 3, 4), (3, 4, 2), whole):
        assert word_pieces().enclosed(list(map(TokenId, tokens))) == whole
    assert (tiny().opening, tiny().closing) == ((), ())
    assert tiny().enclosed([TokenId(5)]) == (5,)


def test_what_would_be_read_as_a_special_token_is_refused() -> None:
    assert unigram().encode("the dog", beginning=True)
    with pytest.raises(InvalidInput, match="text: names </s>, which this tokenizer cannot read"):
        unigram().encode("the dog</s>", beginning=True)


def test_how_many_tokens_a_text_has_is_told_before_it_is_encoded_where_that_can_be() -> None:
    with pytest.raises(TooLarge):
        tiny().check_fits("x" * 10_000, room=3)
    word_pieces().check_fits(" " * 10_000, room=3)
    assert len(word_pieces().encode(" " * 10_000, beginning=True)) == 2
