"""Kernel strategies, one to a module: whatever module is here is found and can be named.

``auto`` takes the first in :data:`PREFERRED` that can run the model.
"""

import importlib
import pkgutil
from typing import Any, Final, TypeVar

from infra.engine.forward import Prepared, Shape, Strategy, Unsupported

_Class = TypeVar("_Class", bound=type[Strategy])

PREFERRED: Final = {"cpu": ("strict", "onednn", "tile"), "cuda": ("cuda", "tile")}
"""By device, best first."""

_known: dict[str, type[Strategy]] = {}


def strategy(kind: _Class) -> _Class:
    """Make a strategy known under its name."""
    _known[kind.name] = kind
    return kind


def known() -> dict[str, type[Strategy]]:
    """Every strategy by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _known


def prepare(model: Any, name: str, shape: Shape, *, threads: int) -> Prepared:
    """Make a model ready with the strategy of this name, or the best one for ``auto``.

    Raises:
        Unsupported: no strategy can; says why for each.
    """
    names = PREFERRED[shape.device.type] if name == "auto" else (name,)
    reasons: list[str] = []
    for each in names:
        if each not in known():
            continue
        try:
            return known()[each](threads).prepare(model, shape)
        except Unsupported as error:
            reasons.append(f"{each}: {error}")
    raise Unsupported("; ".join(reasons))
