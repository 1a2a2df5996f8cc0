"""Compiled code is kept, and never that of another text."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import pytest

HELPER = """
from infra.engine.kernels.compiling import inlined

@inlined
def added(x):
    return x + {number}
"""
ENTRY = """
import helper
from infra.engine.kernels.compiling import compiled

def _run(x):
    return helper.added(x)

kernel = compiled(_run, "f8(f8)", {sources}, nogil=True)
"""
BOTH = "(__file__, helper.__file__)"

Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Runs the text of two modules, whose files never seem to change: same time, same size."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")

    def run(name: str, text: str) -> ModuleType:
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        os.utime(file, (10**9, 10**9))
        module = ModuleType(name)
        module.__file__ = str(file)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(text, file, "exec"), module.__dict__)
        return module

    def loaded(*, number: float = 1.0, sources: str = BOTH) -> Any:
        run("helper", HELPER.format(number=number))
        return run("entry", ENTRY.format(sources=sources)).kernel

    return loaded


def hits(kernel: Any) -> int:
    return sum(kernel.stats.cache_hits.values())


def test_unchanged_text_is_compiled_once(load: Load) -> None:
    assert hits(load()) == 0
    again = load()
    assert hits(again) == 1
    assert again(1.0) == 2.0


def test_changed_text_of_any_source_is_compiled_anew(load: Load) -> None:
    assert load(number=1.0)(1.0) == 2.0
    changed = load(number=2.0)
    assert hits(changed) == 0
    assert changed(1.0) == 3.0
    assert hits(load(number=1.0)) == 1


def test_control_a_source_that_is_not_named_can_be_stale(load: Load) -> None:
    assert load(number=1.0, sources="(__file__,)")(1.0) == 2.0
    assert load(number=2.0, sources="(__file__,)")(1.0) == 2.0


def test_what_an_interrupted_process_left_behind_is_not_trusted(load: Load, tmp_path: Path) -> None:
    load(number=1.0)
    (old,) = tmp_path.glob("__pycache__/*.nbc")
    load(number=2.0)
    (new,) = set(tmp_path.glob("__pycache__/*.nbc")) - {old}
    new.unlink()  # the index says it is there
    again = load(number=2.0)
    assert hits(again) == 0
    assert again(1.0) == 3.0


def test_the_users_own_folder_serves_where_that_of_the_source_cannot_be_written(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / "__pycache__").touch()  # no folder can be made here
    load()
    assert hits(load()) == 1
    assert list(tmp_path.glob("user/**/*.nbc"))


def test_without_any_folder_kernels_are_compiled_each_time(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
    monkeypatch.setattr(numba.config, "CACHE_DIR", "/dev/null/nowhere")
    load()
    again = load()
    assert hits(again) == 0
    assert again(1.0) == 2.0


def test_a_folder_that_takes_no_more_does_no_harm(load: Load, tmp_path: Path) -> None:
    load()
    (index,) = tmp_path.glob("__pycache__/*.nbi")
    index.unlink()
    index.mkdir()  # writing it fails, as on a disk that is full
    assert load()(1.0) == 2.0
