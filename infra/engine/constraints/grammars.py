"""Constraints as llguidance's grammars, and what is wrong with one in its client's terms.

Nothing is forced: llguidance may narrow a mask to the tokenizer's own way of writing what must
follow, which depends on more than the text. Without it a token may come exactly where the text
with its bytes can still become one of the language.
"""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import msgspec

from domain.config import Constraint
from domain.errors import InvalidInput, invalid
from infra.engine.constraints import grammar_trial

MAX_BYTES: Final = 1 << 16

_UNFORCED: Final = '%llguidance {"no_forcing": true}'
_ONE_LINE: Final = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""Where JSON allows any white space, a text could go on with it for ever."""
_TRIAL_SECONDS: Final = 20.0
"""By the clock; the trial's own limit is that of its CPU time."""
_REMEMBERED_TRIALS: Final = 256
_MAX_MESSAGE: Final = 300

_PLACE: Final = re.compile(r"(?:at )?(\d+)\((\d+)\): ")
_IN_REGEX: Final = re.compile(r'invalid regex ".*?" \(in regex\): ', re.DOTALL)
_REGEX_ERROR: Final = re.compile(
    r"regex parse error:\n(?P<excerpt>.*?)\nerror: (?P<error>[^\n]*)", re.DOTALL
)
_ESCAPE_OR_SLASH: Final = re.compile(r"\\.|/", re.DOTALL)
_LARK_PIECE: Final = re.compile(
    r"""(?P<refused>
            <[^<>\s]+>                                         # tokens by name or number
          | "(?:x-guidance|allow_invalid_utf8)"                # options in JSON
          | \b(?:max_tokens|temperature|stop)(?=\s*=)          # options of a rule
        )
      | "(?:\\.|[^"\\\n])*" | /(?:\\.|[^/\\])+/ | (?:\#|//)[^\n]*  # literals and comments""",
    re.VERBOSE,
)


def grammar(constraint: Constraint) -> str:
    """The constraint as llguidance takes it.

    Raises:
        InvalidInput: it is too large, not JSON, or uses what is not supported; names it.
    """
    size = len(constraint.text.encode())
    if size > MAX_BYTES:
        raise refused(constraint, f"it has {size} bytes; {MAX_BYTES} are allowed")
    match constraint.kind:
        case "regex":
            return _encoded([{"lark_grammar": f"start: /{_regex(constraint)}/\n{_UNFORCED}"}])
        case "lark":
            return _encoded([{"lark_grammar": f"{_lark(constraint)}\n{_UNFORCED}"}])
        case "json_schema":
            start = {"lark_grammar": f"start: @schema\n{_UNFORCED}"}
            return _encoded([start, {"name": "schema", "json_schema": _json_schema(constraint)}])


def refused(constraint: Constraint, problem: str) -> InvalidInput:
    """The refusal of a constraint."""
    return invalid(f"constraint.{constraint.kind}", problem[:_MAX_MESSAGE])


def explained(constraint: Constraint, message: str) -> str:
    """What llguidance says of a constraint, with its place, without our additions to the text."""
    if message.startswith("panic"):
        return "llguidance cannot read it"
    found = _PLACE.match(message)
    place = f"line {found[1]}, column {found[2]}: " if found and constraint.kind == "lark" else ""
    said = _IN_REGEX.sub("", message[found.end() :] if found else message, 1)
    if error := _REGEX_ERROR.search(said):
        if constraint.kind == "regex":
            line, column = _regex_place(constraint.text, error["excerpt"])
            return f"line {line}, column {column}: {error['error']}"
        pattern = error["excerpt"].split("\n")[0].strip()
        return f"{place}{error['error']} in the regex {pattern}"
    said = said.replace("Unsatisfiable schema: ", "no text satisfies it: ").partition("\n")[0]
    return place + re.sub(r" at line 1 column \d+$", "", said)  # of the JSON we put it into


def endures_trial(grammar: str) -> bool:
    """Whether a grammar can be compiled and followed in reasonable time, memory and depth.

    Raises:
        RuntimeError: it could not be tried.
    """
    try:
        return _tried(grammar)
    except subprocess.TimeoutExpired:  # not remembered: the machine may have been busy
        return False


@lru_cache(_REMEMBERED_TRIALS)
def _tried(grammar: str) -> bool:
    command = [sys.executable, "-P", grammar_trial.__file__]
    trial = subprocess.run(
        command, input=grammar.encode(), capture_output=True, timeout=_TRIAL_SECONDS
    )
    if trial.returncode == 1:  # an exception of Python's
        raise RuntimeError(f"a grammar could not be tried: {trial.stderr.decode().strip()}")
    return trial.returncode == 0


def _encoded(grammars: Sequence[Mapping[str, object]]) -> str:
    return msgspec.json.encode({"grammars": grammars}).decode()


def _regex(constraint: Constraint) -> str:
    """The regular expression as it stands between the slashes of Lark."""
    text = constraint.text
    if len(text) - len(text.rstrip("\\")) & 1:
        raise refused(constraint, f"column {len(text)}: a backslash escapes nothing")
    unwritable = {"/": r"\/", "\\\n": r"\n"}
    return _ESCAPE_OR_SLASH.sub(lambda piece: unwritable.get(piece[0], piece[0]), text)


def _lark(constraint: Constraint) -> str:
    for piece in _LARK_PIECE.finditer(constraint.text):
        if name := piece["refused"]:
            line = constraint.text.count("\n", 0, piece.start()) + 1
            raise refused(constraint, f"line {line}: {name} is not supported")
    return constraint.text


def _json_schema(constraint: Constraint) -> Any:
    """The schema, with the form of the JSON that is to satisfy it."""
    try:
        schema = msgspec.json.decode(constraint.text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise refused(constraint, str(error)) from error
    if schema is False:
        return schema
    given = schema if isinstance(schema, dict) else {}
    if "x-guidance" in given:
        raise refused(constraint, '"x-guidance" is not supported')
    return {**given, "x-guidance": _ONE_LINE}


def _regex_place(regex: str, excerpt: str) -> tuple[int, int]:
    """Line and column that the carets of an error's excerpt point at, as in ``regex``."""
    lines = [line for line in excerpt.split("\n") if not line.startswith("~~~")]
    line, margin, column = 1, 4, 1
    for above, below in pairwise(lines):
        if below.strip(" ^") == "" and "^" in below:
            if number := re.match(r" *(\d+): ", above) if "~~~" in excerpt else None:
                line, margin = int(number[1]), number.end()
            column = below.index("^") - margin + 1
    for piece in _ESCAPE_OR_SLASH.finditer(regex.split("\n")[line - 1]):
        if piece[0] == "/" and piece.start() + 1 < column:
            column -= 1
    return line, column
