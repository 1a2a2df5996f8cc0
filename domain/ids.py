"""Names for the integers and strings that identify things, so that they cannot be mixed up."""

from typing import Annotated, Final, NewType

from msgspec import Meta

StateId = NewType("StateId", str)
"""``state-`` followed by 32 hexadecimal digits."""

ModelId = NewType("ModelId", str)
"""The name of a model as clients give it: an embedded model, a hub name or a configured one."""

Version = NewType("Version", int)
"""Number of the latest event of one state: 1, 2, 3 ... without a gap. 0 means "does not exist"."""

Position = NewType("Position", int)
"""Global order of an event in the log, assigned by its one writer. 0 means "before the first"."""

TokenId = NewType("TokenId", int)
"""Index into a model's vocabulary."""

MAX_SEED: Final = 2**53 - 1
"""Largest seed: the largest integer that JSON, JavaScript and SQLite all keep exactly."""

Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]
