"""Where the sites of a model are in its program, found while that is written."""

import math
from collections.abc import Sequence

from infra.engine.forward import Site, Weighing
from infra.engine.strict.program import Domain, Mode, Operand, Place
from infra.engine.strict.values import Rows


class Sites:
    """Those noted so far; one that a pass would come by twice, or in other floats, is none."""

    def __init__(self) -> None:
        self._noted: dict[Site, Place | None] = {}

    def note(
        self,
        site: Site,
        value: Rows,
        axes: Sequence[int],
        before: int,
        weighing: Weighing | None = None,
    ) -> None:
        """A site's rows are the ``axes`` of a value, before the operation of that index."""
        shape = tuple(value.shape.shape[axis] for axis in axes)
        strides = [value.shape.stride(axis) for axis in axes]
        whole = math.prod(shape) == value.shape.numel() and 0 not in strides
        if site in self._noted or value.domain != Domain.ROWS or not whole:
            self._noted[site] = None
            return
        outer, inner = (0, *strides)[-2:]
        offset = int(value.shape.storage_offset())
        operand = Operand(Mode.ROW, offset, 0, outer, inner, value.slot)
        self._noted[site] = Place(before, operand, shape, weighing)

    def places(self) -> dict[Site, Place]:
        """By site, in the order of the program."""
        return {site: place for site, place in self._noted.items() if place is not None}
