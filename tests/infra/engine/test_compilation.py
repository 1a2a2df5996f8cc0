"""No question has to wait until what answers it is compiled, nor has any stream."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.engine.engine import Engine
from infra.engine.kernels import compiling
from tests.infra.engine import small_models


def kernels() -> Iterator[Any]:
    """The functions that compile what is called from Python, and keep it."""
    ours = {name: module for name, module in sys.modules.items() if name.startswith("infra.")}
    for name, module in sorted(ours.items()):
        compiles = getattr(module, "compiled", None) is compiling.compiled
        if compiles and module is not compiling:
            own = [each for each in vars(module).values() if hasattr(each, "cache_clear")]
            assert own, f"{name} compiles something that is not kept"
            yield from own


def test_a_loaded_model_has_every_kernel_that_serving_it_needs(
    engine: Engine, tmp_path: Path
) -> None:
    folder = small_models.write(tmp_path / "model", small_models.smallest())
    assert len(list(kernels())) >= 6
    for kernel in kernels():
        kernel.cache_clear()
    small_models.language_model(folder, engine)
    for kernel in kernels():
        assert kernel.cache_info().currsize == 1, f"{kernel.__module__} waits to be asked"
