"""The documentation is held against the product: examples run, tables are compared."""

import contextlib
import io
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import click
import httpx
import msgspec
import pytest
from litestar.exceptions import HTTPException

from app import schemas, service
from app.bootstrap import default_config
from app.cli import main
from app.pictures import attention as drawn_attention
from app.pictures import lens as drawn_lens
from app.pictures import tokens as drawn_tokens
from app.problems import problem_of
from app.representations import NotAcceptable, nested
from app.routes import analysis
from app.settings import PREFIX, Settings
from domain import errors
from domain.analysis import attention, lens, ranges
from domain.analysis.parameters import Asked
from domain.analysis.result import ResultChanged
from domain.config import StateConfig
from domain.events import Event
from domain.ids import MAX_SEED, ModelId, Position, StateId, Version
from domain.log_errors import LogError
from tests.forking import FAST, FastServer, Nursery
from tests.support import Server, clean_environment
from tests.warm_shell import WarmShell

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
API, ANALYSIS, AUDIT, CONCEPTS, ERRORS, ADVANCED, DEVELOPMENT = (
    ROOT / "docs" / f"{name}.md"
    for name in ("api", "analysis", "audit", "concepts", "errors", "advanced", "development")
)
EXECUTED = {"bash", "python", "sql"}
SHOWN = {"json", "text"}
URL = "http://127.0.0.1:8000"
ASKING = "/v1/analyze/"
OTHER_URL = "http://127.0.0.1:8001"
INDEX = "[]0123456789"
ANYTHING = "\N{HORIZONTAL ELLIPSIS}"

STABLE = {
    *("result", "type", "title", "status", "field", "expected_version", "current_version"),
    *("version", "head_position", "finished", "finish_reason", "start", "index", "at_version"),
    *("model_id", "model_type", "kind", "schema", "tokens_reused", "deterministic", "dtype"),
    *("temperature", "top_p", "top_k", "context_size", "store_logits", "top_k_logits", "message"),
    *("text", "new_tokens", "token_ids", "token_id", "tokens", "seed", "bytes"),
    *("beams", "branch", "dropped", "resumes"),
    *("layer", "layers", "head", "heads", "end", "indices", "shape", "key_name", "tier", "rank"),
    *("label", "greedy", "greedy_changed", "changed", "original_rank", "edited_rank"),
}
"""Members whose values are the same on every machine and in every log."""


PIECE = re.compile(r"(?P<left_out>\.\.\.)|(?P<id>(?<![0-9a-z])[0-9a-f]{8,}(?![0-9a-z]))|.")
PATTERNS: dict[str | None, str] = {"left_out": ".*", "id": "[0-9a-f]+"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. ``excuse`` says why it is not run, if it is not."""

    page: str
    line: int
    language: str
    code: str
    excuse: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


FENCE = re.compile(
    r"(?:^<!-- not run: (?P<excuse>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: str, text: str) -> list[Block]:
    return [
        Block(
            page=page,
            line=text.count("\n", 0, found.start("language")) + 1,
            language=found["language"],
            code=found["code"],
            excuse=found["excuse"],
        )
        for found in FENCE.finditer(text)
    ]


@cache
def read(page: Path) -> str:
    return page.read_text()


def blocks_of(page: Path) -> list[Block]:
    return blocks(page.name, read(page))


ALL_BLOCKS = [block for page in PAGES for block in blocks_of(page)]


class Reader:
    """Someone who types the examples of one page into one terminal, from top to bottom.

    In a folder with the database of the server; there may be another server.
    """

    def __init__(
        self, folder: Path, programs: Path, server: Server, other: Server | None = None
    ) -> None:
        self._folder = folder
        self._urls = {URL: server.url} | ({} if other is None else {OTHER_URL: other.url})
        self._names: dict[str, Any] = {}
        self._kept = folder / ".environment"
        if server.database.parent != folder:
            (folder / "cacher.db").symlink_to(server.database)
        path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = clean_environment(
            **FAST,
            PATH=path,
            PYTHONPATH=str(ROOT),
            # Our plugin as if Cacher was installed, whether it is or not.
            PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
            PYTEST_ADDOPTS="-p app.pytest_plugin -p no:cacheprovider",
        )

    def run(self, block: Block) -> str:
        """Run a block and return what it prints."""
        code = block.code
        for shown, actual in self._urls.items():
            code = code.replace(shown, actual)
        match block.language:
            case "bash":
                return self._bash(block, code)
            case "python":
                return self._python(block, code)
            case _:
                return self._sql(code)

    def _bash(self, block: Block, code: str) -> str:
        script = f"set -aeuo pipefail\n{code}\nenv -0 > '{self._kept}'"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{block} exits {done.returncode}: {done.stdout}{done.stderr}"
        pairs = (pair.partition("=") for pair in self._kept.read_text().split("\0") if pair)
        self._environment = {name: value for name, _, value in pairs}
        return done.stdout

    def _python(self, block: Block, code: str) -> str:
        printed = io.StringIO()
        with contextlib.chdir(self._folder), contextlib.redirect_stdout(printed):
            exec(compile(code, str(block), "exec"), self._names)
        return printed.getvalue()

    def _sql(self, code: str) -> str:
        """What the sqlite3 shell prints."""
        uri = f"file:{self._folder}/cacher.db?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            rows = [row for part in code.split(";") for row in database.execute(part)]
        return "".join("|".join("" if c is None else str(c) for c in r) + "\n" for r in rows)


def follow(page: list[Block], reader: Reader) -> None:
    """Run the examples of a page in order and hold what is shown against what they print."""
    printed: str | None = None
    for block in page:
        if block.excuse is not None:
            continue
        if block.language in EXECUTED:
            printed = reader.run(block)
        else:
            assert printed is not None, f"{block} shows the output of nothing"
            found = differences(block, printed)
            assert not found, f"{block}: {'; '.join(found)}\nprinted was:\n{printed}"


def differences(block: Block, printed: str) -> list[str]:
    """Where a shown answer is not that which was printed."""
    if block.language == "text":
        return list(unlike_lines(block.code, printed))
    answer = printed[re.search(r"^[{\[]", printed, re.MULTILINE).start() :]  # type: ignore[union-attr]
    return list(unlike(shortened(block.code), json.JSONDecoder().raw_decode(answer)[0], "$"))


def shortened(shown: str) -> Any:
    """A shown answer as JSON; ``...`` stands for any value, or for members left out."""

    def replace(found: re.Match[str]) -> str:
        if found[0] != "...":
            return found[0]
        before, after = shown[: found.start()].rstrip(), shown[found.end() :].lstrip()
        member = after.startswith("}") and not before.endswith(":")
        return f'"{ANYTHING}": 0' if member else f'"{ANYTHING}"'

    return json.loads(re.sub(r'"(?:\\.|[^"\\])*"|\.\.\.', replace, shown))


def unlike(shown: Any, actual: Any, path: str) -> Iterator[str]:
    """Members of ``shown`` that ``actual`` lacks, or has with another type or value."""
    match shown, actual:
        case str(), _ if shown == ANYTHING:
            return
        case dict(), dict():
            members = shown.keys() - {ANYTHING}
            missing = members - actual.keys()
            untold = actual.keys() - members if ANYTHING not in shown else set()
            yield from (f"{path}.{name} is not in the answer" for name in sorted(missing))
            yield from (f"{path}.{name} is not shown" for name in sorted(untold))
            for name in members & actual.keys():
                yield from unlike(shown[name], actual[name], f"{path}.{name}")
        case list(), list():
            items = [item for item in shown if item != ANYTHING]
            if len(items) > len(actual) or (len(items) == len(shown) != len(actual)):
                yield f"{path} has {len(actual)} items"
            for index, (one, other) in enumerate(zip(items, actual, strict=False)):
                yield from unlike(one, other, f"{path}[{index}]")
        case _ if not agree(shown, actual, stable=path.rpartition(".")[2].strip(INDEX) in STABLE):
            yield f"{path} is {actual!r}"


def agree(shown: Any, actual: Any, *, stable: bool) -> bool:
    """Whether a shown value is of the actual one's type and, if ``stable``, the value.

    A fraction is shown rounded.
    """
    match shown, actual:
        case float(), int() | float():
            return math.isclose(shown, actual, rel_tol=0.01)
        case str(), str() if stable or "..." in shown:
            return re.fullmatch(pattern_of(shown), actual) is not None
        case _:
            return type(shown) is type(actual) and (not stable or shown == actual)


def unlike_lines(shown: str, printed: str) -> Iterator[str]:
    """Lines that were not printed, in this order."""
    lines = iter(printed.replace("\r", "").splitlines())
    for line in filter(None, shown.splitlines()):
        if not any(re.fullmatch(pattern_of(line), candidate) for candidate in lines):
            yield f"no line like {line!r}"


def pattern_of(shown: str) -> str:
    """What a shown text stands for: ``...`` for anything, a long hexadecimal for any other."""
    return PIECE.sub(lambda found: PATTERNS.get(found.lastgroup, re.escape(found[0])), shown)


ON_ANY_LOG = [page for page in PAGES if page != AUDIT]


@pytest.fixture(scope="module")
def programs(nursery: Nursery) -> Iterator[Path]:
    """Where the shell of a reader finds ``cacher`` and ``python``."""
    with WarmShell(nursery, clean_environment()) as shell:
        yield shell.programs


@pytest.mark.parametrize("page", ON_ANY_LOG, ids=lambda page: page.name)
def test_the_examples_of_a_page_run_in_order_and_print_what_it_shows(
    page: Path, tmp_path: Path, programs: Path, server: Server
) -> None:
    follow(blocks_of(page), Reader(tmp_path, programs, server))


def test_the_examples_of_audit_run_in_order_on_a_log_of_their_own(
    tmp_path: Path, programs: Path, nursery: Nursery
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with (
        FastServer(nursery, tmp_path / "cacher.db") as server,
        FastServer(nursery, elsewhere / "other.db", CACHER_ERASABLE="true") as other,
    ):
        follow(blocks_of(AUDIT), Reader(tmp_path, programs, server, other))


def test_every_block_is_run_or_compared_or_says_why_not() -> None:
    unaccounted = [
        str(block)
        for block in ALL_BLOCKS
        if not (block.excuse or (block.excuse is None and block.language in EXECUTED | SHOWN))
    ]
    assert not unaccounted
    assert sum(read(page).count("```") for page in PAGES) == 2 * len(ALL_BLOCKS)


def test_every_example_that_sends_a_request_is_run() -> None:
    requests = [b for b in ALL_BLOCKS if re.search(r"^\s*curl |httpx\.", b.code, re.MULTILINE)]
    assert len(requests) > 20
    assert not [str(block) for block in requests if block.excuse is not None]


@pytest.mark.parametrize(
    ("shown", "printed", "found"),
    [
        ('{"a": 1, ...}', '{"a": 2, "b": 3}', []),
        ('{"a": 0.333, ...}', '{"a": 0.33333, "b": 3}', []),
        ('{"a": 0.333, ...}', '{"a": 0.34, "b": 3}', ["$.a is 0.34"]),
        ('{"token_ids": [1, 2]}', '{"token_ids": [1, 3]}', ["$.token_ids[1] is 3"]),
        ('{"a": 1}', '{"a": 2, "b": 3}', ["$.b is not shown"]),
        ('{"a": 1, "c": 2, ...}', '{"a": 1, "b": 3}', ["$.c is not in the answer"]),
        ('{"a": "x", ...}', '{"a": 1, "b": 3}', ["$.a is 1"]),
        ('{"version": 2}', '{"version": 3}', ["$.version is 3"]),
        ('{"hash": "a fox"}', '{"hash": "a cat"}', []),
        ('{"text": "a fox"}', '{"text": "a cat"}', ["$.text is 'a cat'"]),
        ('{"text": "a ... fox"}', '{"text": "a red cat"}', ["$.text is 'a red cat'"]),
        ('{"a": [{"b": 1}, ...]}', '{"a": [{"b": 2}, {"c": 3}]}', []),
        ('{"a": [1, 2]}', '{"a": [1]}', ["$.a has 1 items"]),
        ('{"a": ..., "b": null}', '{"a": [4], "b": 5}', ["$.b is 5"]),
        ('{"finished": true}', '{"finished": 1}', ["$.finished is 1"]),
    ],
)
def test_a_shown_answer_that_is_not_the_one_given_is_found(
    shown: str, printed: str, found: list[str]
) -> None:
    assert differences(Block("page", 1, "json", shown, None), printed) == found


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ("one 1\nsha 0123456789ab", []),
        ("o... 1\nend", []),
        ("one 2", ["no line like 'one 2'"]),
        ("end\none 1", ["no line like 'one 1'"]),
    ],
)
def test_a_shown_line_that_is_not_printed_is_found(shown: str, found: list[str]) -> None:
    printed = "one 1\r\nsha ffffffffffff\nend\n"
    assert differences(Block("page", 1, "text", shown, None), printed) == found


def test_an_example_that_fails_is_found_with_its_place(
    tmp_path: Path, programs: Path, server: Server
) -> None:
    page = "```bash\nA=x\n```\n\n```bash\n[ $A = x ]\ncurl -sf http://127.0.0.1:8000/nope\n```\n"
    with pytest.raises(AssertionError, match=r"page:5 exits 22"):
        follow(blocks("page", page), Reader(tmp_path, programs, server))


@cache
def anchors(page: Path) -> dict[str, str]:
    """Sections of a page with their text, by the anchor GitHub gives their heading."""
    parts = re.split(r"^#+ (.*)$", without_blocks(page), flags=re.MULTILINE)
    titles = [title.lower().replace(" ", "-") for title in parts[1::2]]
    names = [re.sub(r"[^\w-]", "", title) for title in titles]
    assert len(set(names)) == len(names), f"two headings of {page.name} share an anchor"
    return dict(zip(names, parts[2::2], strict=True))


def without_blocks(page: Path) -> str:
    return FENCE.sub("", read(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_blocks(page))
    relative = [link for link in links if not link.startswith("https://")]
    for link in relative:
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.is_file(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_leads_to_every_page() -> None:
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in read(PAGES[0])] == []


@pytest.fixture(scope="module")
def schema(client: httpx.Client) -> dict[str, Any]:
    document: dict[str, Any] = client.get("/schema/openapi.json").json()
    return document


def routes(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    }


def sections() -> dict[str, str]:
    """What the reference says of each route, with the sections that it refers to."""
    parts = re.split(r"^### `(.*)`$", read(API), flags=re.MULTILINE)
    own = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {route: text + referred(text, set()) for route, text in own.items()}


def referred(text: str, seen: set[str]) -> str:
    links = set(re.findall(r"\]\(#([^)]+)\)", text)) - seen
    found = [anchors(API)[link] for link in links]
    return "".join(one + referred(one, seen | links) for one in found)


def test_every_route_has_its_section_and_every_section_its_route(schema: dict[str, Any]) -> None:
    assert len(routes(schema)) > 10
    assert set(sections()) == set(routes(schema))


def members(schema: dict[str, Any], node: Any) -> Iterator[str]:
    """Names of all members that a schema speaks of, at any depth; a model's own files are its."""
    match node:
        case {"$ref": str(ref)}:
            yield from members(schema, schema["components"]["schemas"][ref.rpartition("/")[2]])
        case dict():
            properties = node.get("properties", {})
            yield from properties
            inner = [node.get("items"), *node.get("oneOf", ()), *properties.values()]
            for one in inner:
                yield from members(schema, one)


def test_every_field_of_a_request_and_of_its_answer_is_in_its_section(
    schema: dict[str, Any],
) -> None:
    missing = []
    for route, operation in routes(schema).items():
        bodies = [operation.get("requestBody"), *map(operation["responses"].get, ("200", "201"))]
        documents = [
            document["schema"]
            for body in bodies
            if body is not None
            for document in body["content"].values()
        ]
        names = {name for document in documents for name in members(schema, document)}
        text = sections()[route]
        missing += [f"{route}: {name}" for name in sorted(names) if not named(name, text)]
    assert not missing


def named(name: str, text: str) -> bool:
    return re.search(rf"[`\"]{name}[`\"]", text) is not None


def table(text: str, heading: str) -> dict[str, list[str]]:
    """Rows of the table whose first column is ``heading``, by the name in that column."""
    lines = iter(text.splitlines())
    assert any(line.startswith(f"| {heading} |") for line in lines), f"no table of {heading}s"
    assert next(lines).startswith("|---")
    rows: dict[str, list[str]] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows |= dict.fromkeys(re.findall(r"`([^`]+)`", name), cells)
    return rows


def shown_default(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_every_setting_is_listed_with_its_default() -> None:
    defaults = {f.name: f.default for f in msgspec.structs.fields(Settings)}
    expected = {PREFIX + name.upper(): shown_default(value) for name, value in defaults.items()}
    listed = {name: cells[0] for name, cells in table(read(API), "variable").items()}
    assert listed == expected


UNREACHED = (2**31 - 1, 9999)
"""Upper bounds of positions, layers and heads: the state and the model have less."""


def facts_of(node: dict[str, Any]) -> Iterator[str]:
    """Bounds, choices and the default that a JSON schema gives a value, as the pages write them."""
    for bound in ("minimum", "maximum", "minItems", "maxItems", "maxLength", "maxProperties"):
        if bound in node and node[bound] not in UNREACHED:
            yield "2^53 - 1" if node[bound] == MAX_SEED else f"{node[bound]:.7g}"
    if "exclusiveMinimum" in node:
        yield f"above {node['exclusiveMinimum']}"
    yield from map(str, node.get("enum", ()))
    if isinstance(node.get("default"), bool | int | float | str):
        yield str(node["default"]).lower()
    inside = filter(None, map(node.get, ("items", "additionalProperties")))
    for inner in (*node.get("anyOf", ()), *inside):
        yield from facts_of(inner)


def unsaid(properties: dict[str, dict[str, Any]], rows: dict[str, list[str]]) -> Iterator[str]:
    """What a table does not say of its values."""
    for name, node in properties.items():
        row = " ".join(rows[name])
        facts = () if "as in the [config]" in row else facts_of(node)
        for fact in facts:
            upper_bound_is_the_models = name in ("context_size", "max_tokens", "max_length")
            if not (upper_bound_is_the_models and fact == "1000000") and not says(row, fact):
                yield f"{name}: {fact}"


def says(row: str, fact: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(fact)}(?!\w|\.\d)", row, re.IGNORECASE) is not None


def properties(struct: type[Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = msgspec.json.schema(struct)["$defs"][struct.__name__]
    return found["properties"]


def test_ranges_of_settings_and_of_the_config_are_right() -> None:
    settings = {PREFIX + name.upper(): node for name, node in properties(Settings).items()}
    assert not list(unsaid(settings, table(read(API), "variable")))
    assert not list(unsaid(properties(StateConfig), table(anchors(API)["the-config"], "field")))


def test_defaults_of_the_config_are_right() -> None:
    rows = table(anchors(API)["the-config"], "field")
    default = msgspec.json.decode(msgspec.json.encode(default_config(Settings())))
    assert not [name for name, value in default.items() if not says(rows[name][1], str(value))]


def kinds(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from kinds(narrower)


WISHES: list[type[Any]] = [
    *(schemas.GenerateTokens, schemas.GenerateMulti, schemas.GenerateBeams),
    analysis.Compare,
]
BODIES = {body.__name__: body for body in chain(kinds(schemas.Body), kinds(Asked), WISHES)}


def rows_of(route: str, heading: str) -> dict[str, list[str]]:
    """What the table of a route says, and of a question what that of all of them says."""
    _, _, text = read(API).partition(f"### `{route}`")
    own = table(text, heading)
    if not route.partition(" ")[2].startswith(ASKING):
        return own
    return table(anchors(API)["questions-and-answers"], heading) | own


def test_ranges_and_defaults_of_requests_are_right(schema: dict[str, Any]) -> None:
    wrong = []
    for route, operation in routes(schema).items():
        parameters = operation.get("parameters", ())
        query = {p["name"]: p["schema"] for p in parameters if p["in"] == "query"}
        if query:
            wrong += [f"{route} {fact}" for fact in unsaid(query, rows_of(route, "parameter"))]
        content = operation.get("requestBody", {}).get("content", {})
        if "application/json" in content:
            body = content["application/json"]["schema"]["$ref"]
            fields = properties(BODIES[body.rpartition("/")[2]])
            wrong += [f"{route} {fact}" for fact in unsaid(fields, rows_of(route, "field"))]
    assert not wrong


def test_every_question_is_listed_with_its_route(schema: dict[str, Any]) -> None:
    questions = {route for route in routes(schema) if route.partition(" ")[2].startswith(ASKING)}
    listed = re.findall(rf"`(\w+ {ASKING}[^`]*)`", anchors(ANALYSIS)["what-can-be-asked"])
    assert sorted(listed) == sorted(questions)


def test_limits_of_answers_are_right() -> None:
    limits = (
        *(nested.MAX_NUMBERS, attention.MAX_ROLLED, lens.MAX_READINGS, ranges.MAX_ALTERNATIVES),
        *(drawn_attention.MAX_TOKENS, drawn_attention.MAX_MAPS, drawn_attention.MAX_WEIGHTS),
        *(drawn_lens.MAX_POSITIONS, drawn_lens.MAX_CELLS, drawn_tokens.MAX_TOKENS),
        *(service.MAX_LOOKS, service.MAX_RESULTS),
    )
    said = anchors(ANALYSIS)["limits"]
    assert not [limit for limit in limits if not says(said, f"{limit:,}")]


REFUSALS = (
    errors.invalid("field", "message"),
    errors.StateNotFound(StateId("state-1")),
    errors.StateIsDeleted(StateId("state-1"), "then"),
    errors.VersionNotFound(StateId("state-1"), Version(2), Version(1)),
    errors.ModelNotFound(ModelId("a"), (ModelId("b"),)),
    errors.VersionConflict(StateId("state-1"), Version(1), Version(2)),
    errors.FingerprintChanged(StateId("state-1"), "then", "now"),
    ResultChanged(StateId("state-1")),
    errors.NothingToResume("key"),
    errors.StateExists(StateId("state-1")),
    errors.NotRunnable(StateId("state-1"), ModelId("a"), "reason"),
    errors.HasDescendants(StateId("state-1"), (StateId("state-2"),)),
    errors.NotErasable(),
    errors.StateIsErased(StateId("state-1"), "then"),
    errors.NoSigningKey(),
    errors.ReplayNotFound("replay-1"),
    errors.ExportTooNew("reason"),
    errors.LogAltered(Position(0), Position(1)),
    errors.NotAPrefix(StateId("state-1"), Version(1)),
    errors.IdempotencyKeyReused("key"),
    errors.PreconditionFailed(StateId("state-1"), Version(1), Version(2)),
    errors.QueueFull(1),
    errors.ModelUnavailable(ModelId("a"), "reason", "remedy"),
    errors.LogUnavailable("reason"),
    errors.TooLarge("reason"),
    errors.ResultTooLarge(2, 1, "remedy"),
    NotAcceptable(("application/json",)),
)


def test_every_refusal_is_tried_here() -> None:
    single = {kind for kind in kinds(errors.Refusal) if not kind.__subclasses__()}
    assert single <= {type(refusal) for refusal in REFUSALS}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.slug)
def test_a_refusal_is_listed_with_its_status_and_its_facts(refusal: errors.Refusal) -> None:
    status, facts, _ = table(read(ERRORS), "name")[refusal.slug]
    assert int(status) == problem_of(refusal)["status"]
    if refusal.facts:
        assert set(re.findall(r"`(\w+)`", facts)) == set(refusal.facts)


def test_every_problem_that_is_no_refusal_is_listed() -> None:
    listed = table(read(ERRORS), "name")
    for status in (401, 403, 404, 405, 415):
        problem = problem_of(HTTPException(status_code=status))
        assert listed[problem["type"].removeprefix("/problems/")][0] == str(status)
    for error in (RuntimeError(), LogError("reason")):
        problem = problem_of(error)
        assert listed[problem["type"].removeprefix("/problems/")][0] == str(problem["status"])


def test_names_of_groups_are_said_to_be_never_sent() -> None:
    groups = {kind.slug for kind in kinds(errors.Refusal) if kind.__subclasses__()}
    listed = table(read(ERRORS), "name")
    assert all(f"`{slug}`" in read(ERRORS) for slug in groups - listed.keys())


def test_every_kind_of_event_is_listed() -> None:
    tags = {event.__struct_config__.tag for event in get_args(Event)}
    assert set(table(read(CONCEPTS), "type")) == tags


def commands(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    for part, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


COMMANDS = dict(commands(main, "cacher"))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_is_listed_with_its_options(name: str) -> None:
    options = [p for p in COMMANDS[name].params if isinstance(p, click.Option)]
    listed = table(anchors(ADVANCED)[name.replace(" ", "-")], "option")
    assert set(listed) == {opt for p in options for opt in p.opts}


def test_every_target_of_make_is_listed() -> None:
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared
    assert set(table(read(DEVELOPMENT), "target")) == {f"make {t}" for t in declared[1].split()}
