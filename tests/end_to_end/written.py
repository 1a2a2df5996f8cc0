"""A log that holds every kind of operation, for faults to be planted in."""

from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.end_to_end.calls import LONG, OPENING, Json, query

SAMPLED = {"temperature": 3.0, "top_p": 0.95, "seed": 7}


class Writer:
    """Builds the log: every kind of operation, and the position that each event came to."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self.positions: dict[str, int] = {}

    def _post(self, name: str, path: str, body: Json) -> Any:
        answer = self._client.post(f"/v1/{path}", json=body)
        assert answer.is_success, answer.text
        self.positions[name] = self._client.get("/v1/audit/head").json()["position"]
        return answer.json() if not body.get("stream") else answer.text

    def create(self, name: str, text: str, **config: Any) -> str:
        state: Json = self._post(name, "states", {"text": text, "config": config})
        return str(state["state_id"])

    def do(self, name: str, path: str, state_id: str, **body: Any) -> Any:
        return self._post(name, path, {"state_id": state_id, **body})

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


def write_log(client: httpx.Client) -> dict[str, int]:
    writer = Writer(client)
    parent = write_sampled(writer)
    write_greedy(writer)
    fork = writer.do("forked", "states/fork", parent, version=3)["states"][0]["state_id"]
    writer.do("fork grown", "generate/token", fork, max_tokens=3)
    lost = writer.do("forked to be deleted", "states/fork", parent, position=5)["states"][0]
    writer.delete("deleted", lost["state_id"])
    writer.create("opened", "The end. ")
    return writer.positions


class Log(NamedTuple):
    """The log as it was written: the position of each event by its name."""

    database: Path
    positions: dict[str, int]

    def place(self, name: str) -> tuple[int, str, int]:
        """Position, state and version of an event."""
        sql = "SELECT position, state_id, version FROM events WHERE position = ?"
        (found,) = query(self.database, sql, self.positions[name])
        return tuple(found)

    def start(self, name: str) -> int:
        sql = "SELECT ifnull(json_extract(payload, '$.start'), 0) FROM events WHERE position = ?"
        return int(query(self.database, sql, self.positions[name])[0][0])
