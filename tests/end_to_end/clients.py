"""Clients that do whatever comes to mind and remember every answer, until their server is gone."""

import random
import threading
from typing import NamedTuple

import httpx

from tests.end_to_end.calls import OPENING, Ask, Json, ServerSentEvent, server_sent

KINDS = {
    "create": 2,
    "forward": 3,
    "generate": 4,
    "stream": 4,
    "config": 1,
    "fork": 1,
    "rewind": 2,
    "analyze": 2,
    "delete": 1,
}
"""Operations, and how often each is chosen compared with the others."""
PATHS = {
    "create": "/v1/states",
    "forward": "/v1/forward",
    "generate": "/v1/generate/token",
    "stream": "/v1/generate/token",
    "config": "/v1/states/config",
    "fork": "/v1/states/fork",
    "rewind": "/v1/states/rewind",
}
REFUSED = {404, 409, 413}
"""Another client may have deleted, moved or filled the state."""
MOST_STATES = 5


class Request(NamedTuple):
    """What a client wants: the kind of operation, and how it is asked for."""

    kind: str
    ask: Ask


class Acknowledged(NamedTuple):
    """A request and the whole of the answer that acknowledged it."""

    request: Request
    body: bytes

    @property
    def answer(self) -> Json:
        """The answer's JSON; of a stream, that of its last event."""
        if self.request.kind == "stream":
            return streamed(self.body)[-1].data
        (last,) = server_sent(iter([f"data: {self.body.decode()}"]))
        return last.data

    @property
    def state_ids(self) -> list[str]:
        """The states it is about: several only for a fork."""
        if self.request.kind == "fork":
            return [state["state_id"] for state in self.answer["states"]]
        return [self.answer["state_id"]]


class Unfinished(NamedTuple):
    """A request whose answer never came to its end, and what of it had come."""

    request: Request
    received: bytearray


def streamed(body: bytes | bytearray) -> list[ServerSentEvent]:
    """The events of a stream that have come as a whole."""
    whole, _, _ = bytes(body).rpartition(b"\n\n")
    return list(server_sent(iter(whole.decode().split("\n"))))


class Shared:
    """States that any client may meddle with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state_ids: list[str] = []

    def add(self, state_id: str) -> None:
        with self._lock:
            self._state_ids = [*self._state_ids, state_id][-6:]

    def choose(self, chance: random.Random) -> str | None:
        with self._lock:
            return chance.choice(self._state_ids) if self._state_ids else None


class Whims:
    """Random requests of one client on its own states, and on some of others."""

    def __init__(self, name: str, seed: int, shared: Shared) -> None:
        self._name = name
        self._chance = random.Random(f"{name} {seed}")
        self._shared = shared
        self._own: list[str] = []
        self._asked = 0

    def next(self) -> Request:
        state_id, kind = self._choose()
        self._asked += 1
        key = f"{self._name}-{self._asked}"
        if kind == "delete":
            return Request(kind, Ask("DELETE", f"/v1/states/{state_id}", None, key))
        if kind == "analyze":
            return Request(kind, Ask("GET", f"/v1/analyze/next/{state_id}", None, key))
        body = self._body(kind) | ({} if kind == "create" else {"state_id": state_id})
        return Request(kind, Ask("POST", PATHS[kind], body, key))

    def learn(self, acknowledged: Acknowledged) -> None:
        """Keep in mind which states there are."""
        if acknowledged.request.kind in ("create", "fork"):
            self._own += acknowledged.state_ids
            self._shared.add(acknowledged.state_ids[0])

    def forget(self, request: Request) -> None:
        """A state that is deleted, or turned out to be."""
        state_id = request.ask.path.rpartition("/")[2]
        if request.ask.body is not None:
            state_id = request.ask.body.get("state_id", "")
        if state_id in self._own:
            self._own.remove(state_id)

    def _choose(self) -> tuple[str, str]:
        kind = self._chance.choices(list(KINDS), list(KINDS.values()))[0]
        if not self._own:
            return "", "create"
        if kind in ("create", "fork") and len(self._own) >= MOST_STATES:
            kind = "delete"
        own = self._chance.choice(self._own)
        other = self._shared.choose(self._chance) if self._chance.random() < 0.2 else None
        return other or own, kind

    def _body(self, kind: str) -> Json:
        chance = self._chance
        match kind:
            case "create":
                return {"text": OPENING * chance.randint(1, 2), "config": self._config()}
            case "forward":
                return {"text": " ".join(chance.choices(OPENING.split(), k=chance.randint(1, 9)))}
            case "generate":
                return {"max_tokens": chance.randint(1, 8)}
            case "stream":
                return {"max_tokens": chance.randint(1, 40), "stream": True}
            case "config":
                return {"config": {"temperature": chance.choice([0.0, 0.5, 1.0])}}
            case "fork":
                return {"n": chance.randint(1, 2)}
            case "rewind":
                return {"position": chance.randint(1, 40)}
            case _:
                raise ValueError(kind)

    def _config(self) -> Json:
        return {
            "seed": self._chance.choice([None, self._chance.randrange(2**53)]),
            "temperature": self._chance.choice([0.0, 1.0]),
            "store_logits": self._chance.choice(["none", "top_k", "full"]),
        }


class RandomClient:
    """One client. Between two kills :meth:`run` works in a thread of its own.

    ``resumed`` are streams that a kill cut off, each with the answer to the same request later.
    """

    def __init__(self, name: str, seed: int, shared: Shared) -> None:
        self.acknowledged: list[Acknowledged] = []
        self.resumed: list[tuple[Unfinished, Acknowledged]] = []
        self.unexpected: list[str] = []
        self.unfinished: Unfinished | None = None
        self.cut_off = 0
        self._whims = Whims(name, seed, shared)

    def run(self, client: httpx.Client) -> None:
        """Finish what was cut off, then send one request after the other."""
        try:
            self.finish(client)
            while not self.unexpected:
                self._send(client, self._whims.next())
        except httpx.ConnectError:  # the server was gone before the request was sent
            return
        except httpx.TransportError:
            self.cut_off += 1

    def finish(self, client: httpx.Client) -> None:
        """Send once more what was cut off, with its key."""
        if self.unfinished is None:
            return
        before = self.unfinished
        acknowledged = self._send(client, before.request)
        if acknowledged and acknowledged.request.kind == "stream":
            self.resumed.append((before, acknowledged))

    def _send(self, client: httpx.Client, request: Request) -> Acknowledged | None:
        received = bytearray()
        self.unfinished = Unfinished(request, received)
        ask = request.ask
        with client.stream(ask.method, ask.path, **ask.options) as answer:
            for chunk in answer.iter_bytes():
                received += chunk
        self.unfinished = None
        past_the_end = request.kind == "rewind" and answer.status_code == 400
        if past_the_end or answer.status_code in REFUSED:
            if answer.status_code == 404:
                self._whims.forget(request)
            return None
        if not answer.is_success or b"event: error" in received:
            self.unexpected.append(f"{ask}: {answer.status_code} {received.decode()}")
            return None
        return self._note(Acknowledged(request, bytes(received)))

    def _note(self, acknowledged: Acknowledged) -> Acknowledged:
        self._whims.learn(acknowledged)
        if acknowledged.request.kind == "delete":
            self._whims.forget(acknowledged.request)
        self.acknowledged.append(acknowledged)
        return acknowledged
