"""An analysis as a client wants to see it, by ``Accept``: JSON, or a tensor's exact bits."""

from typing import Any

import msgspec
from litestar import Request, Response

from app.operations.analysis.analyze import Analyzed
from domain.analysis.result import Tensor


def represent(
    request: Request[Any, Any, Any], found: Analyzed, headers: dict[str, str]
) -> Response[Any]:
    """The answer to a question, in the form that the client asks for."""
    body = {
        "state_id": found.state.state_id,
        "version": found.state.version,
        **msgspec.to_builtins(found.result.facts),
        **{tensor.name: nested(tensor) for tensor in found.result.tensors},
    }
    return Response(msgspec.json.encode(body), media_type="application/json", headers=headers)


def nested(tensor: Tensor) -> Any:
    """A tensor's elements as lists in lists; what JSON has no number for is null."""
    raise NotImplementedError
