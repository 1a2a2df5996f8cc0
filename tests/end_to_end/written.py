"""A log that holds every kind of operation, for faults to be planted in."""

from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.end_to_end.calls import LONG, OPENING, Json, query

SAMPLED = {"temperature": 3.0, "top_p": 0.95, "seed": 7}
PENALTIES = {
    "logit_bias": {"300": 2.0, "14": -1.5},
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "bad_words_ids": [[5], [6, 7]],
    "min_p": 0.001,
    "typical_p": 0.9,
}
OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}


class Writer:
    """Builds the log: every kind of operation, and the position that each event came to."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self.positions: dict[str, int] = {}

    def post(self, name: str, path: str, body: Json) -> Any:
        """Send a request; the last event that it records gets a name."""
        answer = self._client.post(f"/v1/{path}", json=body)
        assert answer.is_success, answer.text
        self.positions[name] = self._client.get("/v1/audit/head").json()["position"]
        return answer.json() if not body.get("stream") else answer.text

    def create(self, name: str, text: str, **config: Any) -> str:
        state: Json = self.post(name, "states", {"text": text, "config": config})
        return str(state["state_id"])

    def do(self, name: str, path: str, state_id: str, **body: Any) -> Any:
        return self.post(name, path, {"state_id": state_id, **body})

    def name_before(self, last: str, *names: str) -> None:
        """Name the events that were recorded together with ``last``, just before it."""
        for back, name in enumerate(reversed(names), start=1):
            self.positions[name] = self.positions[last] - back

    def look(self, name: str, state_id: str, version: int) -> None:
        path = f"/v1/analyze/next/{state_id}"
        assert self._client.get(path, params={"version": version}).is_success
        self.positions[name] = self._client.get("/v1/audit/head").json()["position"]

    def delete(self, name: str, state_id: str) -> None:
        assert self._client.delete(f"/v1/states/{state_id}").is_success
        self.positions[name] = self._client.get("/v1/audit/head").json()["position"]


def write_sampled(writer: Writer) -> str:
    """A state that draws at random and keeps logits: forwarded, generated, rewound, streamed."""
    state_id = writer.create("created", LONG, store_logits="top_k", **SAMPLED)
    writer.do("forwarded", "forward", state_id, text="One day the bear said: ")
    writer.do("generated", "generate/token", state_id, max_tokens=8, top_logprobs=2)
    writer.do("configured", "states/config", state_id, config={"store_logits": "full"})
    writer.do("kept in full", "generate/token", state_id, max_tokens=4)
    writer.do("rewound", "states/rewind", state_id, version=3)
    writer.do("streamed", "generate/token", state_id, max_tokens=5, stream=True)
    return state_id


def write_greedy(writer: Writer) -> str:
    """A state whose generations end in every way that can be brought about."""
    state_id = writer.create("greedy", OPENING, temperature=0.0, store_logits="none")
    tried = writer.do("all tokens", "generate/token", state_id, max_tokens=4)
    writer.do("rewound again", "states/rewind", state_id, version=1)
    stops = [tried["token_ids"][2]]
    writer.do("stop token", "generate/token", state_id, max_tokens=9, stop_token_ids=stops)
    stop_sequences = [" ", ".", "e"]
    body = {"max_tokens": 30, "stop_sequences": stop_sequences}
    writer.do("stop sequence", "generate/token", state_id, **body)
    size = writer.do("last word", "forward", state_id, text=" and")["head_position"] + 2
    writer.do("made smaller", "states/config", state_id, config={"context_size": size})
    writer.do("full", "generate/token", state_id, max_tokens=5)
    writer.do("nothing drawn", "generate/token", state_id, max_tokens=5)
    return state_id


def write_several(writer: Writer) -> str:
    """A state that is continued in several ways, searched on, and held to languages."""
    state_id = writer.create("several", OPENING, store_logits="top_k", **SAMPLED)
    body: Json = {"max_tokens": 6, "top_logprobs": 1}
    writer.do("continued", "generate/multi", state_id, n=3, **body)
    writer.do("searched", "generate/beam", state_id, num_beams=4, max_length=6, num_return=2)
    diverse: Json = {"num_beam_groups": 2, "diversity_penalty": 0.5, "no_repeat_ngram_size": 2}
    penalised = {"repetition_penalty": 1.2, "logit_bias": {"300": 1.5}}
    body = {"num_beams": 4, "max_length": 5, "early_stopping": "never", "num_return": 4}
    writer.do("searched apart", "generate/beam", state_id, **body, **diverse, **penalised)
    writer.do("penalised", "generate/token", state_id, max_tokens=6, **PENALTIES)
    regex = {"regex": "[a-z]{3}[0-9]{2}"}
    writer.do("constrained", "generate/token", state_id, max_tokens=9, constraint=regex)
    body = {"n": 2, "max_tokens": 24, "constraint": {"json_schema": OBJECT}}
    writer.do("objects", "generate/multi", state_id, **body)
    grammar = {"lark": 'start: "yes" | "no"'}
    writer.do("answers", "generate/multi", state_id, n=2, max_tokens=2, constraint=grammar)
    return state_id


def write_sliding(writer: Writer) -> str:
    """A state that is soon full: its generation slides, and so does a text that is forwarded."""
    config = {"context_size": 12, "on_full": "slide", "store_logits": "top_k", **SAMPLED}
    body = {"tokens": list(range(300, 308)), "config": config}
    state_id = str(writer.post("small", "states", body)["state_id"])
    writer.do("slid on", "generate/token", state_id, max_tokens=8, ignore_eos=True)
    writer.name_before("slid on", "filled", "slid")
    writer.do("pushed", "forward", state_id, tokens=[400, 401, 402, 403])
    writer.name_before("pushed", "slid for more")
    writer.do("continued after sliding", "generate/multi", state_id, n=2, max_tokens=2)
    return state_id


def write_derived(writer: Writer, several: str, sliding: str) -> None:
    """States that come from others: from one of their continuations or beams, and from all."""
    chosen: Json = {"version": 2, "index": 1}
    adopted = writer.do("adopted", "states/fork", several, continuation=chosen)["states"][0]
    writer.do("adopted and grown", "generate/token", adopted["state_id"], max_tokens=2)
    chosen = {"version": 3, "index": 0}
    writer.do("adopted beam", "states/fork", several, continuation=chosen)
    writer.do("forked after sliding", "states/fork", sliding)
    roomy = {"context_size": 256, "on_full": "stop"}
    body = {"state_ids": [adopted["state_id"], several, sliding], "config": roomy}
    merged = writer.post("merged", "states/merge", body | {"strategy": "concatenate"})
    writer.do("merged and grown", "generate/token", merged["state_id"], max_tokens=2)


def write_log(client: httpx.Client) -> dict[str, int]:
    writer = Writer(client)
    parent = write_sampled(writer)
    write_greedy(writer)
    writer.look("looked", parent, 3)
    fork = writer.do("forked", "states/fork", parent, version=3)["states"][0]["state_id"]
    writer.do("fork grown", "generate/token", fork, max_tokens=3)
    lost = writer.do("forked to be deleted", "states/fork", parent, position=5)["states"][0]
    writer.delete("deleted", lost["state_id"])
    write_derived(writer, write_several(writer), write_sliding(writer))
    writer.create("opened", "The end. ")
    return writer.positions


class Log(NamedTuple):
    """The log as it was written: the position of each event by its name."""

    database: Path
    positions: dict[str, int]

    def place(self, name: str) -> tuple[int, str, int]:
        """Position, state and version of an event; that which an analysis saw."""
        version = "coalesce(version, at_version)"
        sql = f"SELECT position, state_id, {version} FROM events WHERE position = ?"
        (found,) = query(self.database, sql, self.positions[name])
        return tuple(found)

    def delete(self, client: httpx.Client, name: str) -> None:
        """Delete a state of it where it is served: one more event, which takes no model."""
        assert client.delete(f"/v1/states/{self.place(name)[1]}").is_success

    def start(self, name: str) -> int:
        sql = "SELECT ifnull(json_extract(payload, '$.start'), 0) FROM events WHERE position = ?"
        return int(query(self.database, sql, self.positions[name])[0][0])
