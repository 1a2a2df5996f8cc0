"""Changes of a written log, each with how re-execution names it."""

import math
import sqlite3
from collections.abc import Callable
from typing import Any, NamedTuple

from domain.chain import blobs_digest
from domain.events import SCHEMA
from tests.end_to_end.tampering import blobs, edit, edit_blob, read, set_column

STATE_ID = "SELECT state_id FROM events WHERE position = ?"

Plant = Callable[[sqlite3.Connection, int], None]
"""Changes the event at a position."""


class Fault(NamedTuple):
    """A change of one event, and how re-execution names it.

    ``token`` is the place in the event, where the field has one value for each token.
    ``found_in`` is another event that shows it: the first that it makes impossible.
    """

    event: str
    plant: Plant
    field: str
    token: int | None = None
    found_in: str | None = None


def in_payload(change: Callable[[Any], None]) -> Plant:
    return lambda connection, position: edit(connection, position, change)


def column(name: str, value: Any) -> Plant:
    return lambda connection, position: set_column(connection, position, name, value)


def put(*path: str | int, value: Any) -> Plant:
    """Change one value in the payload; a callable gets the old one."""

    def change(payload: Any) -> None:
        for step in path[:-1]:
            payload = payload[step]
        old = payload[path[-1]]
        payload[path[-1]] = value(old) if callable(value) else value
        assert payload[path[-1]] != old

    return in_payload(change)


def other_token(token: int) -> int:
    return token ^ 1


def next_float(value: float) -> float:
    return math.nextafter(value, -math.inf)


def other_hex(text: str) -> str:
    return f"{int(text[0], 16) ^ 1:x}{text[1:]}"


def blob_and_digest(connection: sqlite3.Connection, position: int) -> None:
    edit_blob(connection, position, step=1)
    digest = blobs_digest(blobs(connection, position))
    put("stored_logits", "digest", value=digest)(connection, position)


def without_logits(connection: sqlite3.Connection, position: int) -> None:
    connection.execute("DELETE FROM logits WHERE position = ?", (position,))
    put("stored_logits", value=None)(connection, position)


def lengthen(content: Any) -> None:
    """Repeat a content until no model of this size holds it."""
    length = content["ends"][-1]
    content["ends"] = [end + n * length for n in range(500) for end in content["ends"]]
    content["tokens"] *= 500
    content["text"] *= 500


def remove_state(connection: sqlite3.Connection, position: int) -> None:
    """Remove a state that has but one event."""
    (state_id,) = connection.execute(STATE_ID, (position,)).fetchone()
    connection.execute("DELETE FROM events WHERE state_id = ?", (state_id,))
    connection.execute("DELETE FROM states WHERE state_id = ?", (state_id,))


def retell(connection: sqlite3.Connection, position: int) -> None:
    """Exchange a prompt for another, tokens, text and all."""
    sql = "SELECT position FROM events WHERE type = 'state_created' ORDER BY position LIMIT 1"
    content = read(connection, *connection.execute(sql).fetchone())["content"]
    put("content", value=content)(connection, position)


def rule_out(payload: Any) -> None:
    """Allow but one text, and not its one token."""
    payload["parameters"]["constraint"]["text"] = "a"
    payload["parameters"]["sampling"]["bad_words_ids"] = [[65]]


def fork_itself(connection: sqlite3.Connection, position: int) -> None:
    """Let a state begin with what it holds itself, whatever that is."""
    (state_id,) = connection.execute(STATE_ID, (position,)).fetchone()
    count = len(read(connection, position)["content"]["tokens"])
    origin = {"kind": "fork", "state_id": state_id, "version": 1, "head_position": count}
    put("origin", value=origin)(connection, position)
    put("content", "text", value=lambda text: "X" * len(text))(connection, position)


def merge_a_later_one(connection: sqlite3.Connection, position: int) -> None:
    """Let a state be merged with one that began after it: the last one of the log."""
    (latest,) = connection.execute("SELECT max(position) FROM events").fetchone()
    (state_id,) = connection.execute(STATE_ID, (latest,)).fetchone()
    put("origin", "parents", 1, "state_id", value=state_id)(connection, position)
    put("origin", "parents", 1, "version", value=1)(connection, position)


def rewind_instead(connection: sqlite3.Connection, position: int) -> None:
    """Put a rewind in the place of another event and its logits."""
    connection.execute("DELETE FROM logits WHERE position = ?", (position,))
    payload = '{"to_position":1,"type":"head_rewound"}'
    for name, value in {"type": "head_rewound", "payload": payload, "fingerprint": None}.items():
        set_column(connection, position, name, value)


def as_older(connection: sqlite3.Connection, position: int) -> None:
    """Pass an event off as one of the first schema, with something that this did not have."""
    set_column(connection, position, "schema", 1)
    put("content", "partial", value={"0": "ff"})(connection, position)


def no_continuations(connection: sqlite3.Connection, position: int) -> None:
    without_logits(connection, position)
    put("continuations", value=[])(connection, position)


def fill(payload: Any) -> None:
    """Leave a state no room."""
    payload["config"]["context_size"] = len(payload["content"]["tokens"])


def another_parent(parent: int) -> int:
    return (parent + 1) % 4


def reverse(values: list[Any]) -> list[Any]:
    return values[::-1]


FAULTS: dict[str, Fault] = {
    "a changed token": Fault(
        "generated", put("content", "tokens", 2, value=other_token), "content.tokens", 2
    ),
    "a changed last token": Fault(
        "streamed", put("content", "tokens", 4, value=other_token), "content.tokens", 4
    ),
    "a changed greedy token": Fault(
        "all tokens", put("content", "tokens", 1, value=other_token), "content.tokens", 1
    ),
    "a changed forwarded token": Fault(
        "forwarded", put("content", "tokens", 1, value=other_token), "scores.logprobs", 1
    ),
    "a changed text": Fault("generated", put("content", "text", value=str.upper), "content.text"),
    "a changed text of the beginning": Fault(
        "created", put("content", "text", value=str.lower), "content.text"
    ),
    "another place where a token's text ends": Fault(
        "forwarded", put("content", "ends", 0, value=lambda end: end - 1), "content.text"
    ),
    "a changed prompt token": Fault(
        "created", put("content", "tokens", 3, value=other_token), "content.text"
    ),
    "a changed digest": Fault(
        "generated", put("scores", "logits_digests", 5, value=other_hex), "scores.logits_digests", 5
    ),
    "a changed digest of a forwarded token": Fault(
        "forwarded", put("scores", "logits_digests", 0, value=other_hex), "scores.logits_digests", 0
    ),
    "a changed seed": Fault("generated", put("seed", value=8), "content.tokens"),
    "a logprob changed by one bit": Fault(
        "streamed", put("scores", "logprobs", 3, value=next_float), "scores.logprobs", 3
    ),
    "a changed rank": Fault(
        "forwarded", put("scores", "ranks", 2, value=lambda rank: rank + 1), "scores.ranks", 2
    ),
    "a changed entropy": Fault(
        "generated", put("scores", "entropies", 0, value=next_float), "scores.entropies", 0
    ),
    "a changed logsumexp": Fault(
        "generated", put("scores", "logsumexps", 7, value=next_float), "scores.logsumexps", 7
    ),
    "a changed sampling probability": Fault(
        "generated",
        put("sampling_probabilities", 6, value=next_float),
        "sampling_probabilities",
        6,
    ),
    "a changed alternative": Fault(
        "generated", put("alternatives", 4, 1, "logprob", value=next_float), "alternatives", 4
    ),
    "a changed temperature": Fault(
        "generated", put("parameters", "sampling", "temperature", value=0.0), "content.tokens"
    ),
    "an end that was none": Fault("generated", put("finish_reason", value="eos"), "finish_reason"),
    "an end made to look like a client that left": Fault(
        "stop token", put("finish_reason", value="cancelled"), "finish_reason"
    ),
    "an end kept quiet": Fault("stop sequence", put("finish_reason", value=None), "finish_reason"),
    "a stop that was not asked for": Fault(
        "stop sequence", put("parameters", "stop_sequences", value=["zzz"]), "finish_reason"
    ),
    "fewer tokens asked for than drawn": Fault(
        "all tokens", put("parameters", "max_tokens", value=3), "len(content.tokens)"
    ),
    "a full context that had room": Fault(
        "made smaller",
        put("changes", "context_size", value=lambda size: size + 9),
        "finish_reason",
        found_in="full",
    ),
    "a changed digest of stored logits": Fault(
        "generated", put("stored_logits", "digest", value=other_hex), "stored_logits.digest"
    ),
    "changed stored logits and their digest": Fault(
        "generated", blob_and_digest, "stored_logits.digest"
    ),
    "changed full logits and their digest": Fault(
        "kept in full", blob_and_digest, "stored_logits.digest"
    ),
    "another number of stored logits": Fault(
        "generated", put("stored_logits", "k", value=19), "stored_logits.digest"
    ),
    "stored logits that are no more": Fault("kept in full", without_logits, "stored_logits"),
    "a fork that does not begin as its parent": Fault(
        "forked", put("content", "tokens", 3, value=other_token), "content.tokens"
    ),
    "a fork that begins with less than it says": Fault(
        "forked", put("origin", "head_position", value=9), "content.tokens"
    ),
    "a fork of an earlier version": Fault(
        "forked", put("origin", "version", value=2), "content.tokens"
    ),
    "a fork of a version that is not there": Fault(
        "forked", put("origin", "version", value=999), "origin.version"
    ),
    "a fork that says it holds more": Fault(
        "forked", put("origin", "head_position", value=10**6), "origin.head_position"
    ),
    "a field that no release writes": Fault(
        "created", in_payload(lambda payload: payload.update(approved_by="nobody")), "event"
    ),
    "a beginning under a fingerprint that is not there": Fault(
        "created", column("fingerprint", "junk"), "fingerprint"
    ),
    "a number of stored logits that cannot be": Fault(
        "generated", put("stored_logits", "k", value=0), "event"
    ),
    "a change that claims to be a look": Fault("generated", column("at_version", 7), "at_version"),
    "a changed start": Fault("generated", put("start", value=lambda start: start - 1), "event"),
    "a rewind to another place": Fault(
        "rewound", put("to_position", value=7), "event", found_in="streamed"
    ),
    "a rewind past the head": Fault("rewound again", put("to_position", value=500), "event"),
    "a rewind to nothing": Fault("rewound again", put("to_position", value=0), "event"),
    "a changed type": Fault("deleted", column("type", "state_created"), "event"),
    "a newer schema": Fault("forwarded", column("schema", SCHEMA + 1), "event"),
    "another version": Fault("streamed", column("version", 30), "event"),
    "a version that hides an event": Fault("streamed", column("version", None), "version"),
    "a version before the first": Fault("streamed", column("version", -1), "version"),
    "another state": Fault("deleted", column("state_id", "state-none"), "event"),
    "a payload that cannot be read": Fault("generated", column("payload", "{"), "event"),
    "a fingerprint that is not there": Fault(
        "generated", column("fingerprint", "ab" * 32), "fingerprint"
    ),
    "no fingerprint": Fault("generated", column("fingerprint", None), "fingerprint"),
    # What a model cannot be asked about at all.
    "a token that is not in the vocabulary": Fault(
        "generated", put("content", "tokens", 2, value=10**6), "content.tokens", 2
    ),
    "a prompt token below the vocabulary": Fault(
        "created", put("content", "tokens", 2, value=-1), "content.tokens", 2
    ),
    "more tokens than the model can hold": Fault(
        "opened", in_payload(lambda payload: lengthen(payload["content"])), "len(content.tokens)"
    ),
    "fewer ends than tokens": Fault(
        "generated", put("content", "ends", value=lambda ends: ends[:-1]), "len(content.ends)"
    ),
    "fewer logprobs than tokens": Fault(
        "forwarded", put("scores", "logprobs", value=lambda old: old[1:]), "len(scores.logprobs)"
    ),
    "scores of no token": Fault(
        "nothing drawn", put("scores", "ranks", value=[1]), "len(scores.ranks)"
    ),
    "fewer alternatives than tokens": Fault(
        "generated", put("alternatives", value=lambda old: old[1:]), "len(alternatives)"
    ),
}


# Of continuations, searches, languages and slides, and of states that come from others.
FAULTS |= {
    "a changed token of a continuation": Fault(
        "continued",
        put("continuations", 1, "content", "tokens", 2, value=other_token),
        "continuations[1].content.tokens",
        2,
    ),
    "a changed digest of a continuation": Fault(
        "continued",
        put("continuations", 2, "scores", "logits_digests", 4, value=other_hex),
        "continuations[2].scores.logits_digests",
        4,
    ),
    "a changed logprob of a continuation": Fault(
        "continued",
        put("continuations", 1, "scores", "logprobs", 0, value=next_float),
        "continuations[1].scores.logprobs",
        0,
    ),
    "a changed sampling probability of a continuation": Fault(
        "continued",
        put("continuations", 0, "sampling_probabilities", 3, value=next_float),
        "continuations[0].sampling_probabilities",
        3,
    ),
    "a changed alternative of a continuation": Fault(
        "continued",
        put("continuations", 0, "alternatives", 1, 0, "logprob", value=next_float),
        "continuations[0].alternatives",
        1,
    ),
    "an end of a continuation that was none": Fault(
        "continued",
        put("continuations", 2, "finish_reason", value="eos"),
        "continuations[2].finish_reason",
    ),
    "a changed text of a continuation": Fault(
        "continued",
        put("continuations", 1, "content", "text", value=str.upper),
        "continuations[1].content.text",
    ),
    "continuations in another order": Fault(
        "continued", put("continuations", value=reverse), "continuations[0].content.tokens"
    ),
    "a continuation that is no more": Fault(
        "continued", put("continuations", value=lambda old: old[:2]), "stored_logits.digest"
    ),
    "fewer ranks than tokens of a continuation": Fault(
        "continued",
        put("continuations", 1, "scores", "ranks", value=lambda old: old[1:]),
        "len(continuations[1].scores.ranks)",
    ),
    "another seed of continuations": Fault(
        "continued", put("seed", value=8), "continuations[0].content.tokens"
    ),
    "changed stored logits of continuations and their digest": Fault(
        "continued", blob_and_digest, "stored_logits.digest"
    ),
    "no stored logits of continuations": Fault("continued", without_logits, "stored_logits"),
    "a changed token of a continuation after a slide": Fault(
        "continued after sliding",
        put("continuations", 1, "content", "tokens", 1, value=other_token),
        "continuations[1].content.tokens",
        1,
    ),
    "a changed token of a beam": Fault(
        "searched",
        put("beams", 1, "content", "tokens", 3, value=other_token),
        "beams[1].content.tokens",
        3,
    ),
    "a changed token of a step": Fault(
        "searched", put("steps", 2, "tokens", 1, value=other_token), "steps[2].tokens", 2
    ),
    "another parent in a step": Fault(
        "searched", put("steps", 3, "parents", 0, value=another_parent), "steps[3].parents", 3
    ),
    "a parent that did not run": Fault(
        "searched", put("steps", 3, "parents", 0, value=4), "steps[3].parents", 3
    ),
    "a step that is no more": Fault(
        "searched", put("steps", value=lambda old: old[:-1]), "steps[4]", 4
    ),
    "a changed score of a beam": Fault(
        "searched", put("beams", 0, "score", value=next_float), "beams[0].score"
    ),
    "a beam that did not end": Fault(
        "searched", put("beams", 0, "finished", value=lambda old: not old), "beams[0].finished"
    ),
    "beams in another order": Fault(
        "searched apart", put("beams", value=reverse), "beams[0].content.tokens"
    ),
    "a beam that is no more": Fault(
        "searched apart", put("beams", value=lambda old: old[1:]), "len(beams)"
    ),
    "a changed entropy of a beam": Fault(
        "searched apart",
        put("beams", 2, "scores", "entropies", 1, value=next_float),
        "beams[2].scores.entropies",
        1,
    ),
    "a changed text of a beam": Fault(
        "searched", put("beams", 1, "content", "text", value=str.upper), "beams[1].content.text"
    ),
    "another bias of a search": Fault(
        "searched apart",
        put("parameters", "logits", "logit_bias", value={"300": 50.0}),
        "steps[0].tokens",
        0,
    ),
    "groups that were not": Fault(
        "searched apart", put("parameters", "num_beam_groups", value=1), "steps[0].tokens", 0
    ),
    "groups that cannot be": Fault(
        "searched apart",
        put("parameters", "num_beam_groups", value=3),
        "parameters.num_beam_groups",
    ),
    "another penalty of a generation": Fault(
        "penalised",
        put("parameters", "sampling", "presence_penalty", value=50.0),
        "content.tokens",
    ),
    "a bias for a token that is not in the vocabulary": Fault(
        "penalised",
        put("parameters", "sampling", "logit_bias", value={"5000": 1.0}),
        "parameters.sampling.logit_bias",
    ),
    "another constraint": Fault(
        "constrained",
        put("parameters", "constraint", "text", value="[a-z]{3}[A-Z]{2}"),
        "content.tokens",
    ),
    "a constraint that asks for more": Fault(
        "constrained",
        put("parameters", "constraint", "text", value="[a-z]{3}[0-9]{2}x"),
        "finish_reason",
    ),
    "no constraint": Fault(
        "constrained", put("parameters", "constraint", value=None), "finish_reason"
    ),
    "a constraint that is none": Fault(
        "constrained",
        put("parameters", "constraint", "text", value="[a-z"),
        "parameters.constraint",
    ),
    "a constraint that leaves nothing to choose from": Fault(
        "constrained", in_payload(rule_out), "parameters"
    ),
    "another constraint of continuations": Fault(
        "answers",
        put("parameters", "constraint", "text", value='start: "maybe" | "no"'),
        "continuations[0].content.tokens",
    ),
    "a changed number that slid away": Fault("slid", put("dropped", value=5), "dropped"),
    "a slide of a state that stops": Fault(
        "small", put("config", "on_full", value="stop"), "dropped", found_in="slid"
    ),
    "another number of tokens drawn before": Fault("slid on", put("resumes", value=3), "resumes"),
    "a call that resumes nothing": Fault("slid on", put("resumes", value=0), "finish_reason"),
    "a seed that changed in a call": Fault("slid on", put("seed", value=8), "seed"),
    "a parameter that changed in a call": Fault(
        "slid on", put("parameters", "sampling", "top_k", value=5), "parameters"
    ),
    "another continuation adopted": Fault(
        "adopted", put("origin", "continuation", "index", value=2), "content.tokens"
    ),
    "a continuation adopted that is not there": Fault(
        "adopted", put("origin", "continuation", "index", value=9), "origin.continuation.index"
    ),
    "another beam adopted": Fault(
        "adopted beam", put("origin", "continuation", "index", value=1), "content.tokens"
    ),
    "no continuation adopted": Fault(
        "adopted", put("origin", "continuation", value=None), "content.tokens"
    ),
    "a fork that forgets what slid away": Fault(
        "forked after sliding", put("dropped", value=0), "dropped"
    ),
    "merged in another order": Fault(
        "merged", put("origin", "parents", value=reverse), "content.tokens"
    ),
    "merged with one that is not there": Fault(
        "merged", put("origin", "parents", 1, "version", value=99), "origin.parents[1].version"
    ),
    "merged with less of one": Fault(
        "merged",
        put("origin", "parents", 2, "head_position", value=1),
        "origin.parents[2].head_position",
    ),
    "a changed token of a merge": Fault(
        "merged", put("content", "tokens", 25, value=other_token), "content.tokens"
    ),
    "bytes of a token that are none": Fault(
        "generated", put("content", "partial", value={"0": "c3"}), "content.partial"
    ),
}

# What no request brings about, although each thing that it says may be so.
FAULTS |= {
    "a fork of itself": Fault("opened", fork_itself, "origin.version"),
    "merged with one that began later": Fault(
        "merged", merge_a_later_one, "origin.parents[1].version"
    ),
    "merged with none": Fault(
        "merged", put("origin", "parents", value=lambda old: old[:1]), "len(origin.parents)"
    ),
    "merged with itself": Fault(
        "merged",
        put("origin", "parents", value=lambda old: [*old, old[0]]),
        "origin.parents[3].state_id",
    ),
    "a fork with another model": Fault("forked", put("model_id", value="another"), "model_id"),
    "a merge with another type of model": Fault(
        "merged", put("model_type", value="sequence_classification"), "model_type"
    ),
    "a fork that says its model's revision": Fault(
        "forked", put("model_revision", value="deadbeef"), "model_revision"
    ),
    "a slide that no text comes after": Fault(
        "slid on", rewind_instead, "dropped", found_in="slid"
    ),
    "a schema before the first": Fault("forwarded", column("schema", 0), "event"),
    "bytes of a token under a schema that has none": Fault("opened", as_older, "content.partial"),
    "no continuations at all": Fault("continued", no_continuations, "len(continuations)"),
    "a search that found nothing": Fault(
        "searched", in_payload(lambda payload: payload.update(steps=[], beams=[])), "len(beams)"
    ),
    "a context above the model's": Fault(
        "opened", put("config", "context_size", value=10**6), "config.context_size"
    ),
    "a context below the tokens held": Fault(
        "made smaller", put("changes", "context_size", value=3), "config.context_size"
    ),
    "a stop token that is not in the vocabulary": Fault(
        "configured",
        in_payload(lambda payload: payload["changes"].update(stop_token_ids=[10**6])),
        "config.stop_token_ids[0]",
    ),
    "a text that did not fit": Fault(
        "created", in_payload(fill), "len(content.tokens)", found_in="forwarded"
    ),
}
