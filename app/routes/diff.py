"""``/v1/states/{a}/diff/{b}``."""

from typing import Annotated

from litestar import Router
from litestar.params import Parameter

from app.operations.diff import compare
from app.routes.handlers import reading
from app.service import Service
from domain.diff import Diff
from domain.ids import StateId, Version

MAX_POSITIONS = 1024


@reading("/states/{a:str}/diff/{b:str}")
async def diff_states(
    a: str,
    b: str,
    service: Service,
    version_a: int | None = None,
    version_b: int | None = None,
    start: Annotated[int, Parameter(ge=0, le=2**53 - 1)] = 0,
    limit: Annotated[int, Parameter(ge=0, le=MAX_POSITIONS)] = 128,
) -> Diff:
    """How two states, or two versions of one, differ: text, settings, and what could come next.

    The KL divergence is given at ``limit`` positions at most, from the position ``start`` on.
    """
    return await compare(
        service,
        (StateId(a), None if version_a is None else Version(version_a)),
        (StateId(b), None if version_b is None else Version(version_b)),
        start=start,
        limit=limit,
    )


router = Router("/v1", tags=["states"], route_handlers=[diff_states])
