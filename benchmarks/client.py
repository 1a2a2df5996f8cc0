"""A client of the API that costs little beside the server: both share the same cores."""

import http.client
import json
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from typing import Any, Final

from benchmarks.workload import GREEDY

TIMEOUT_S: Final = 300.0
_KEPT_ALIVE_S: Final = 2.0
"""Idle connections are closed by the server after 5 s; by ours before that."""


class Client:
    """One connection to a server, kept alive between requests. For one thread at a time."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        self._used = time.monotonic()

    def close(self) -> None:
        """End the connection, and with it a stream that is under way; the next request opens it."""
        self._http.close()

    def get(self, path: str) -> bytes:
        """The body of an answer."""
        with closing(self._send("GET", path)) as response:
            return response.read()

    def tensor(self, path: str, **body: Any) -> bytes:
        """A tensor that a request answers, in the format of numpy."""
        with closing(self._send("POST", path, body, accept="application/x-npy")) as response:
            return response.read()

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a request."""
        with closing(self._send("POST", path, body)) as response:
            return json.loads(response.read())

    def create(self, tokens: list[int], model_id: str | None = None) -> str:
        """A state with these tokens; nothing is computed yet."""
        state_id: str = self.post("/v1/states", tokens=tokens, model_id=model_id)["state_id"]
        return state_id

    def hold(self, tokens: list[int]) -> str:
        """A state with these tokens whose K/V is in the cache."""
        state_id = self.create(tokens)
        self.generate(state_id, 1)
        self.post("/v1/states/rewind", state_id=state_id, position=len(tokens))
        return state_id

    def fork(self, state_id: str, count: int) -> list[str]:
        """Forks of a state."""
        answer = self.post("/v1/states/fork", state_id=state_id, n=count)
        return [state["state_id"] for state in answer["states"]]

    def generate(self, state_id: str, new: int, how: Mapping[str, Any] = GREEDY) -> None:
        """Continue a state by exactly ``new`` tokens, drawn with a fresh seed."""
        answer = self.post("/v1/generate/token", **_wish(state_id, new, how))
        assert len(answer["token_ids"]) == new, answer["finish_reason"]

    def branch(self, state_id: str, count: int, new: int, how: Mapping[str, Any]) -> None:
        """Continue a state in ``count`` ways, each by exactly ``new`` tokens."""
        answer = self.post("/v1/generate/multi", n=count, **_wish(state_id, new, how))
        drawn = [len(one["token_ids"]) for one in answer["continuations"]]
        assert drawn == count * [new], drawn

    def search(self, state_id: str, beams: int, new: int) -> None:
        """Find the best of so many beams, each of exactly ``new`` tokens."""
        body = {"state_id": state_id, "num_beams": beams, "max_length": new}
        (found,) = self.post("/v1/generate/beam", **body)["sequences"]
        assert len(found["token_ids"]) == new, found

    def verify(self, *state_ids: str) -> None:
        """Have all that was generated for states computed again and compared."""
        report = self.post("/v1/replay/verify", state_ids=state_ids)
        assert not report["divergences"], report

    def stream(
        self, state_id: str, new: int, how: Mapping[str, Any] = GREEDY
    ) -> Generator[float, None, None]:
        """Continue a state likewise; the time (:func:`time.perf_counter`) of each token."""
        body = {**_wish(state_id, new, how), "stream": True}
        name, data, tokens = b"", b"", 0
        with closing(self._send("POST", "/v1/generate/token", body)) as response:
            for line in response:
                field, _, value = line.rstrip().partition(b": ")
                if field == b"event":
                    name = value
                elif field == b"data":
                    data = value
                    if name == b"token":
                        tokens += 1
                        yield time.perf_counter()
        assert (name, tokens) == (b"done", new), data.decode()

    def tokens_hot(self, state_id: str) -> int:
        """How many tokens of a state have their K/V in the cache."""
        view = json.loads(self.get(f"/v1/states/{state_id}?include=cache"))
        hot: int = view["cache"]["tokens_hot"]
        return hot

    def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        accept: str = "application/json",
    ) -> http.client.HTTPResponse:
        if time.monotonic() - self._used > _KEPT_ALIVE_S:
            self._http.close()  # opened again by itself
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Accept": accept}
        self._http.request(method, path, content, headers)
        response = self._http.getresponse()
        self._used = time.monotonic()
        if response.status >= 400:
            raise RuntimeError(f"{method} {path}: {response.read().decode()}")
        return response


def _wish(state_id: str, new: int, how: Mapping[str, Any]) -> dict[str, Any]:
    return {"state_id": state_id, "max_tokens": new, "seed": None, **how}
