"""What the house is built like: who knows whom, how long a page is, what travels in the wheel."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("app", "domain", "infra")
FOLDERS: Final = {*PACKAGES, "tests", "migrations", "docs", "benchmarks", "scripts"}
MODULES: Final = [
    file.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
]
MAX_FUNCTION_LINES: Final = 70
MAX_MODULE_LINES: Final = 400
FRAMEWORKS: Final = {"torch", "transformers", "litestar", "aiosqlite", "numpy"}
OUTSIDE_WORLD: Final = {"os", "pathlib", "random", "secrets", "socket", "sqlite3", "time", "uuid"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text("utf-8"), module)


def imported(module: str) -> set[str]:
    """Full names of everything a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(module)}


def of(*prefixes: str) -> list[str]:
    found = [module for module in MODULES if module.startswith(prefixes)]
    assert found, f"no module under {prefixes}"
    return found


def definitions(module: str) -> Iterator[tuple[str, Definition]]:
    """Functions, classes and methods with their dotted names; not those inside a function."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
        for node in body:
            if isinstance(node, Definition):
                yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")

    return walk(tree(module).body, "")


# imports point inward


def knowing(modules: list[str], forbidden: set[str]) -> dict[str, set[str]]:
    """Which of these modules import from a forbidden package, and what."""
    found = {module: packages(module) & forbidden for module in modules}
    return {module: names for module, names in found.items() if names}


def test_the_domain_knows_nobody() -> None:
    assert knowing(of("domain/"), {"app", "infra"} | FRAMEWORKS) == {}


def test_the_domain_reaches_for_no_disk_clock_or_chance() -> None:
    assert knowing(of("domain/"), OUTSIDE_WORLD) == {}
    assert not any("datetime.datetime" in imported(module) for module in of("domain/"))


def test_infra_does_not_know_the_application() -> None:
    assert knowing(of("infra/"), {"app"}) == {}


def test_only_the_composition_root_knows_infra() -> None:
    known = knowing(of("app/"), {"infra", "torch", "transformers", "aiosqlite", "numpy"})
    assert set(known) == {"app/bootstrap.py"}


def test_operations_do_not_know_that_there_is_http() -> None:
    known = {name for module in of("app/operations/") for name in imported(module)}
    assert not {name for name in known if name.startswith(("litestar", "app.routes", "app.main"))}


@pytest.mark.parametrize("module", ["infra/engine/scheduler.py", "infra/engine/blocks.py"])
def test_the_scheduler_and_the_blocks_are_integers_only(module: str) -> None:
    assert not packages(module) & FRAMEWORKS
    ours = {name for name in imported(module) if name.startswith(PACKAGES)}
    assert all(name.startswith("infra.engine.blocks") for name in ours)


def test_nothing_that_is_served_imports_tests_scripts_or_benchmarks() -> None:
    known = knowing(MODULES, {"tests", "scripts", "benchmarks", "pytest", "hypothesis"})
    assert known == {"app/pytest_plugin.py": {"pytest"}}


def test_an_import_that_points_outward_would_be_found() -> None:
    assert knowing(["app/bootstrap.py"], {"infra"}) == {"app/bootstrap.py": {"infra"}}


# pages that can be read


def test_everything_public_says_what_it_is() -> None:
    modules = {module for module in MODULES if not ast.get_docstring(tree(module))}
    silent = {
        f"{module}: {name}"
        for module in MODULES
        for name, node in definitions(module)
        if not any(part.startswith("_") for part in name.split(".")) and not ast.get_docstring(node)
    }
    assert modules | silent == set()


def test_every_function_fits_on_a_screen() -> None:
    long = {
        f"{module}: {name}": length
        for module in MODULES
        for name, node in definitions(module)
        if not isinstance(node, ast.ClassDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_every_module_is_read_in_one_sitting() -> None:
    lines = {m: len((ROOT / m).read_text("utf-8").splitlines()) for m in MODULES}
    assert {m: count for m, count in lines.items() if count > MAX_MODULE_LINES} == {}


# what the project's files name


def project_files() -> list[Path]:
    """Text files of the project: not what tools leave behind."""
    named = [ROOT / folder for folder in sorted(FOLDERS)]
    files = [file for folder in named for file in folder.rglob("*") if file.is_file()]
    files += [file for file in ROOT.iterdir() if file.is_file()]
    left_behind = (".pyc", ".nbc", ".nbi", ".safetensors", ".db", ".lock.db", ".png", ".npz")
    return [file for file in files if not file.name.endswith(left_behind)]


# Put together here, so that this file does not hold what it looks for.
MACHINE_PATH: Final = re.compile(r"(?<![\w.*-])/(?:" + "|".join(["work", "root", "home"]) + r")/")
REGISTRY: Final = re.compile(
    "|".join(["py" + r"pi\.org", "python" + "hosted", "download." + "pytorch", "index" + "-url"])
)


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine path", "registry"])
def test_no_file_names_a_machine_path_or_a_package_registry(pattern: re.Pattern[str]) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for file in project_files()
        for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []


def test_the_patterns_find_what_they_look_for() -> None:
    for path in ("work", "root", "home"):
        assert MACHINE_PATH.search(f'open("/{path}/x")')
    assert not MACHINE_PATH.search("docs/work/x")
    assert REGISTRY.search("https://" + "pypi" + ".org/simple")


def test_the_top_level_holds_only_what_it_should() -> None:
    tools = {"build", "dist", "__pycache__"}
    folders = {
        entry.name
        for entry in ROOT.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and entry.suffix != ".egg-info"
    }
    assert folders - tools <= FOLDERS
    assert folders >= {*PACKAGES, "migrations", "tests"}


# the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the installed build backend, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_carries_all_code_migrations_and_embedded_models(wheel: Path) -> None:
    carried = set(zipfile.ZipFile(wheel).namelist())
    folders = [*PACKAGES, "migrations"]
    assert set(MODULES) <= carried
    migrations = {f"migrations/{file.name}" for file in (ROOT / "migrations").glob("*.sql")}
    assert migrations
    assert migrations <= carried
    assert "app/reports/regression.html" in carried
    models = "infra/models/embedded"
    for name in ("cacher-tiny", "cacher-tiny-sentiment"):
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            assert f"{models}/{name}/{file}" in carried
    others = {name for name in carried if name.partition("/")[0] not in folders}
    assert all(".dist-info/" in name for name in others)
    assert not any("__pycache__" in name for name in carried)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    install = ["install", "--no-deps", "--no-index", "--no-compile", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", *install, "--target", target, wheel], check=True, timeout=120
    )
    return target


PROGRAM: Final = """
import sys
from pathlib import Path

import domain
from infra.log.migrate import carried
from infra.models.catalogue import Catalogue
from infra.models.loader import load
import torch

print(Path(domain.__file__).parent.parent)
print([migration.name for migration in carried()])
catalogue = Catalogue("cacher-tiny", ())
print([source.model_id for source in catalogue.sources() if source.kind == "embedded"])
source = catalogue.source("cacher-tiny")
print(Path(source.location).parents[3])
print(load(source, torch.float32).context_size)
"""


def test_the_installed_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    code, migrations, models, location, context = result.stdout.splitlines()
    assert code == location == str(installed)
    assert "events" in migrations
    assert models == "['cacher-tiny', 'cacher-tiny-sentiment']"
    assert int(context) > 0


def test_the_installed_wheel_brings_its_command(installed: Path) -> None:
    (entry_points,) = installed.glob("cacher_api3-*.dist-info/entry_points.txt")
    assert "cacher = app.cli:main" in entry_points.read_text()
    assert "[pytest11]\ncacher = app.pytest_plugin" in entry_points.read_text()
