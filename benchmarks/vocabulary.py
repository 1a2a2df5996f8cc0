"""A tokenizer with as many tokens as the model, so that a mask costs what it costs."""

import random
import string
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_SPACE: Final = bytes_to_unicode()[ord(" ")]
_NUMBERS: Final = 0.03
"""About as large a part of GPT-2's tokens."""


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of ``size`` tokens: all bytes, then random words and numbers.

    As in GPT-2's, most begin with a space. It is made for decoding: text is encoded byte by byte.
    """
    pieces = dict.fromkeys(bytes_to_unicode().values())
    choice = random.Random(0)
    while len(pieces) < size:
        pieces[_piece(choice)] = None
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    fast = Tokenizer(models.BPE(vocabulary, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=fast)


def _piece(choice: random.Random) -> str:
    begin = choice.choice(("", _SPACE, _SPACE))
    if choice.random() < _NUMBERS:
        return begin + str(choice.randrange(1000))
    return begin + "".join(choice.choices(string.ascii_lowercase, k=choice.randint(2, 10)))
