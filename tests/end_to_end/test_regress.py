"""A log replayed under other numerics: what changed is found, measured, kept and held to limits."""

import asyncio
import io
import json
import os
import re
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
import pytest_asyncio
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors.numpy import load_file, save_file

from app.bootstrap import open_baseline, open_models, open_recorded, write_baseline
from app.cli import main
from app.operations.regress import LIKELIEST, Regressor, Request
from app.operations.transfer import Export
from app.operations.verification.verify import Request as VerifyRequest
from app.operations.verification.verify import Verifier
from app.reports import regression as reports
from app.settings import Settings
from domain.chain import Head, row_hash
from domain.errors import NotComparable, StateNotFound
from domain.ids import ModelId, Position, StateId
from domain.log_errors import ChainBroken
from domain.models import Models
from domain.regress import Limits, Regression, Summary
from domain.teacher_forcing import Before
from infra.log.batch import as_row
from infra.log.queries import ROWS
from infra.log.sqlite_reader import SqliteReader
from tests.end_to_end.calls import query
from tests.end_to_end.tampering import edit, edit_blob, rehash_chain, set_column, tampering
from tests.end_to_end.written import Log
from tests.forking import FAST
from tests.infra.engine import small_models

SETTINGS = Settings(model_name="cacher-tiny", threads=1, hot_cache_bytes=64 << 20, max_models=4)
ANYTHING = Limits(**dict.fromkeys(Limits.__struct_fields__))
TINY = ModelId("cacher-tiny")


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved copy of the embedded model in which a part of one tensor is a little larger."""
    folder = tmp_path_factory.mktemp("models") / "perturbed"
    shutil.copytree(small_models.embedded(), folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("h.1.mlp.c_fc.weight"))
    weights[name] = weights[name].copy()
    weights[name][:, :8] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "copied"
    shutil.copytree(small_models.embedded(), folder)
    return folder


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another family, with a small vocabulary and a short context."""
    folder = tmp_path_factory.mktemp("models") / "narrow"
    config = small_models.FAMILIES["llama"]()
    config.update({"max_position_embeddings": 70})
    return small_models.write(folder, config)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(
    models_kept: None, perturbed: Path, copied: Path, narrow: Path
) -> AsyncIterator[Models]:
    """The model that the log was written with, and others, each loaded once."""
    settings = msgspec.structs.replace(
        SETTINGS, allowed_models=(str(perturbed), str(copied), str(narrow))
    )
    async with open_models(settings) as store:
        yield store


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def coarse(models_kept: None) -> AsyncIterator[Models]:
    """The model with its weights in bfloat16."""
    async with open_models(msgspec.structs.replace(SETTINGS, dtype="bfloat16")) as store:
        yield store


async def regress(
    database: Path,
    models: Models,
    *,
    record: Path | None = None,
    against: Path | None = None,
    k: int | None = 64,
    **request: Any,
) -> Regression:
    async with open_recorded(database) as reader:
        if record:
            with write_baseline(record, k=k) as writer:
                return await Regressor(reader, models, writer=writer).run(Request(**request))
        if against:
            with open_baseline(against) as baseline:
                return await Regressor(reader, models, baseline=baseline).run(Request(**request))
        return await Regressor(reader, models).run(Request(**request))


def overall(found: Regression) -> Summary:
    assert found.overall is not None
    return found.overall


def replayed(found: Regression) -> dict[StateId, Summary]:
    return {state.state_id: state.summary for state in found.states if state.summary}


def is_unchanged(found: Regression) -> bool:
    whole = overall(found)
    numbers = (whole.kl_mean, whole.kl_p99, whole.kl_max, whole.max_logprob_delta)
    rates = (whole.sampled_agreement, whole.greedy_agreement)
    return (numbers, rates, whole.first_changed) == ((0.0,) * 4, (1.0, 1.0), None)


# under the same numerics


@pytest.mark.asyncio(loop_scope="module")
async def test_under_the_same_numerics_nothing_changes_to_the_bit(log: Log, models: Models) -> None:
    found = await regress(log.database, models)
    assert is_unchanged(found)
    assert found.failures == ()
    assert found.differences == {}
    assert (found.model, found.before) == ("cacher-tiny", "the log")
    assert {state.worst for state in found.states} == {()}
    sql = "SELECT payload FROM events WHERE type LIKE '%generated' OR type = 'text_forwarded'"
    events = [json.loads(payload) for (payload,) in query(log.database, sql)]
    runs = [run for event in events for run in event.get("continuations", event.get("beams", []))]
    assert len(runs) > 8
    tokens = [len(one["scores"]["logprobs"]) for one in [*events, *runs] if "scores" in one]
    assert overall(found).tokens == sum(tokens)
    assert overall(found).tokens == sum(one.tokens for one in replayed(found).values())


@pytest.mark.asyncio(loop_scope="module")
async def test_a_copy_of_the_model_changes_nothing_and_a_perturbed_tensor_is_found(
    log: Log, models: Models
) -> None:
    assert is_unchanged(await regress(log.database, models, model_id=ModelId("copied")))
    found = await regress(log.database, models, model_id=ModelId("perturbed"))
    assert overall(found).kl_mean > 1e-6
    assert overall(found).first_changed is not None
    assert found.failures
    assert "weights" in found.differences
    assert found.model == "perturbed"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_replay_uses_no_block_of_the_cache(log: Log, models: Models) -> None:
    model = await models.get(TINY)
    before = model.counters()
    await regress(log.database, models)
    after = model.counters()
    assert (after.hits, after.blocks_cached) == (before.hits, before.blocks_cached)


# under others


@pytest.mark.asyncio(loop_scope="module")
async def test_in_bfloat16_the_first_change_and_the_largest_delta_are_those_that_verify_finds(
    log: Log, coarse: Models
) -> None:
    found = await regress(log.database, coarse)
    assert found.differences["dtype"] == ("float32", "bfloat16")
    async with await SqliteReader.open(log.database) as reader:
        drifts = (await Verifier(reader, coarse).run(VerifyRequest())).drifts
    assert len(drifts) > 10
    deltas = {one.position: one.max_logprob_delta for one in drifts}
    assert overall(found).max_logprob_delta == max(deltas.values()) > 1e-3
    for state_id, summary in replayed(found).items():
        mine = [one for one in drifts if one.state_id == state_id]
        assert summary.max_logprob_delta == max(one.max_logprob_delta for one in mine)
        drawn = [(one.position, one.first_changed) for one in mine if one.first_changed is not None]
        first = summary.first_changed
        if first is not None and first.sampled and first.sampled[0] != first.sampled[1]:
            assert (first.position, first.token_position) == min(drawn)
    assert any(one.first_changed for one in replayed(found).values())


@pytest.mark.asyncio(loop_scope="module")
async def test_strips_show_the_worst_places_in_their_text(log: Log, coarse: Models) -> None:
    found = await regress(log.database, coarse)
    strips = [(state, strip) for state in found.states for strip in state.worst]
    assert len(strips) > 5
    pieces: dict[tuple[int, str], str] = {}
    for _, strip in strips:
        worst = strip.places[strip.worst]
        assert worst.changed or worst.kl > 0
        for place in strip.places:
            assert len(place.alternatives) == LIKELIEST
            assert place.alternatives[0].token_id == place.greedy[1]
            logprobs = [one.logprob for one in place.alternatives]
            assert logprobs == sorted(logprobs, reverse=True)
            known = {one.token_id: one.logprob for one in place.alternatives}
            assert known.get(place.token_id, place.logprobs[1]) == place.logprobs[1]
            pieces[place.position, place.run] = pieces.get((place.position, place.run), "")
    for position, run in pieces:
        payload = json.loads(
            query(log.database, "SELECT payload FROM events WHERE position = ?", position)[0][0]
        )
        name, _, index = run.rstrip("].").partition("[")
        text = (payload[name][int(index)] if name else payload)["content"]["text"]
        for _, strip in strips:
            shown = [p.text for p in strip.places if (p.position, p.run) == (position, run)]
            assert "".join(shown) in text


@pytest.mark.asyncio(loop_scope="module")
async def test_a_state_that_the_model_cannot_be_asked_about_is_skipped_with_the_reason(
    log: Log, models: Models
) -> None:
    found = await regress(log.database, models, model_id=ModelId("narrow"), limits=ANYTHING)
    assert 0 < len(replayed(found)) < len(found.states)
    reasons = {state.skipped for state in found.states if state.summary is None}
    assert "no model said anything about its tokens" in reasons
    assert any("content.tokens) is" in str(reason) for reason in reasons)  # it is too long
    assert overall(found).kl_mean > 0.1
    assert found.failures == ()


@pytest.mark.asyncio(loop_scope="module")
async def test_where_nothing_is_replayed_it_could_not_be_done(log: Log, models: Models) -> None:
    opened = StateId(log.place("opened")[1])
    with pytest.raises(NotComparable, match="nothing was replayed: no model said anything"):
        await regress(log.database, models, state_ids=(opened,))
    with pytest.raises(StateNotFound):
        await regress(log.database, models, state_ids=(StateId("state-none"),))


@pytest.mark.asyncio(loop_scope="module")
async def test_of_the_states_that_are_asked_for_each_is_as_it_is_among_all(
    log: Log, coarse: Models
) -> None:
    found = await regress(log.database, coarse)
    for state in found.states:
        if state.summary:
            alone = await regress(log.database, coarse, state_ids=(state.state_id,) * 2)
            assert alone.states == (state,)
            assert alone.overall == state.summary


def seal(payload: Any) -> None:
    """What an erased state leaves."""
    payload.clear()
    payload["sealed"] = "AAAA"


def ask_the_impossible(payload: Any) -> None:
    """Hold a text to a constraint that is none."""
    payload["parameters"]["constraint"]["text"] = "[a-z"


@pytest.mark.parametrize(
    ("event", "change", "reason"),
    [
        ("generated", seal, "sealed, and there is no key to it"),
        ("constrained", ask_the_impossible, "constraint.regex"),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_state_that_cannot_be_read_or_drawn_leaves_the_others_as_they_are(
    event: str,
    change: Callable[[Any], None],
    reason: str,
    log: Log,
    models: Models,
    tmp_path: Path,
) -> None:
    with tampering(log.database, tmp_path / "copy.db", rehash=True) as connection:
        edit(connection, log.positions[event], change)
    found = await regress(tmp_path / "copy.db", models)
    (skipped,) = [state for state in found.states if reason in str(state.skipped)]
    assert skipped.state_id == log.place(event)[1]
    whole = replayed(await regress(log.database, models))
    del whole[skipped.state_id]
    assert replayed(found) == whole


# logs that are not what they were


@pytest.mark.asyncio(loop_scope="module")
async def test_without_stored_logits_the_probabilities_of_tokens_are_compared(
    log: Log, models: Models, coarse: Models, tmp_path: Path
) -> None:
    with tampering(log.database, tmp_path / "copy.db", rehash=False) as connection:
        connection.execute("DELETE FROM logits")
    assert is_unchanged(await regress(tmp_path / "copy.db", models))
    less = overall(await regress(tmp_path / "copy.db", coarse))
    more = overall(await regress(log.database, coarse))
    assert 0 < less.kl_mean < more.kl_mean
    assert less.sampled_agreement == more.sampled_agreement
    assert less.greedy < more.greedy


CHANGES: dict[str, Callable[[sqlite3.Connection, int], None]] = {
    "a token": lambda connection, at: edit(
        connection, at, lambda payload: payload["content"]["tokens"].reverse()
    ),
    "stored logits": lambda connection, at: edit_blob(connection, at, step=2),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_log_that_was_changed_is_not_replayed(
    name: str, log: Log, models: Models, tmp_path: Path
) -> None:
    with tampering(log.database, tmp_path / "copy.db", rehash=False) as connection:
        CHANGES[name](connection, log.positions["generated"])
    with pytest.raises(ChainBroken, match=f"position {log.positions['generated']}: "):
        await regress(tmp_path / "copy.db", models)


# baselines


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def baselines(
    log: Log, models: Models, coarse: Models, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What was recorded with float32 and bfloat16, with some and with all logits."""
    folder = tmp_path_factory.mktemp("baselines")
    found = {name: folder / name for name in ("fine", "fine, full", "coarse", "coarse, full")}
    for name, path in found.items():
        chosen, k = coarse if "coarse" in name else models, None if "full" in name else 64
        await regress(log.database, chosen, record=path, k=k)
    return found


@pytest.mark.asyncio(loop_scope="module")
async def test_against_what_was_just_recorded_nothing_changes_to_the_bit(
    log: Log, models: Models, coarse: Models, baselines: dict[str, Path]
) -> None:
    for name, path in baselines.items():
        found = await regress(log.database, coarse if "coarse" in name else models, against=path)
        assert is_unchanged(found)
        assert overall(found).greedy == overall(found).tokens
        assert overall(found).kl_exact == ("full" in name)
        assert (found.before, found.differences) == ("the baseline", {})


@pytest.mark.asyncio(loop_scope="module")
async def test_recorded_in_float32_and_replayed_in_bfloat16_the_divergence_is_that_of_torch(
    log: Log, coarse: Models, baselines: dict[str, Path]
) -> None:
    was, now = (load_file(baselines[name]) for name in ("fine, full", "coarse, full"))
    found = overall(await regress(log.database, coarse, against=baselines["fine, full"]))
    count = len(was["version"])
    p, q = (
        torch.from_numpy(one["values"]).view(count, -1).double().log_softmax(-1)
        for one in (was, now)
    )
    divergences = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert found.tokens == count
    assert found.kl_exact
    assert found.kl_mean == pytest.approx(float(divergences.mean()), abs=1e-9)
    assert found.kl_max == pytest.approx(float(divergences.max()), abs=1e-9)
    assert found.kl_max > 1e-4
    drawn = was["sampled"] >= 0
    alike = was["sampled"][drawn] == now["sampled"][drawn]
    assert found.sampled_agreement == np.mean(alike) < 1
    assert found.greedy_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    some = overall(await regress(log.database, coarse, against=baselines["fine"]))
    assert 0 < some.kl_mean <= found.kl_mean
    assert not some.kl_exact


@pytest.mark.asyncio(loop_scope="module")
async def test_a_recording_is_the_same_to_the_byte_each_time(
    log: Log, models: Models, baselines: dict[str, Path], tmp_path: Path
) -> None:
    await regress(log.database, models, record=tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == baselines["fine"].read_bytes()
    assert os.listdir(tmp_path) == ["again"]  # noqa: PTH208
    assert baselines["fine"].read_bytes() != baselines["coarse"].read_bytes()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_recording_that_fails_leaves_what_was_there(
    log: Log, models: Models, tmp_path: Path
) -> None:
    path = tmp_path / "baseline"
    path.write_text("kept")
    opened = StateId(log.place("opened")[1])
    with pytest.raises(NotComparable):
        await regress(log.database, models, record=path, state_ids=(opened,))
    assert (os.listdir(tmp_path), path.read_text()) == (["baseline"], "kept")  # noqa: PTH208


def said_by(path: Path) -> Any:
    """What a baseline says of itself."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(json.loads(file.read(length))["__metadata__"]["cacher"])


@pytest.mark.asyncio(loop_scope="module")
async def test_a_baseline_says_what_it_is_of(log: Log, baselines: dict[str, Path]) -> None:
    tensors = load_file(baselines["fine"])
    said = said_by(baselines["fine"])
    head = query(log.database, "SELECT position, lower(hex(hash)) FROM events ORDER BY 1 DESC")[0]
    assert (said["format"], said["version"]) == ("cacher-baseline", 1)
    assert (said["position"], said["hash"]) == head
    assert json.loads(said["fingerprints"][0]["document"])["dtype"] == "float32"
    assert sum(state["places"] for state in said["states"]) == len(tensors["version"])
    first = tensors["ids"].reshape(-1, 64)[:, 0]
    values = tensors["values"].reshape(-1, 64)
    assert (values[:, :-1] >= values[:, 1:]).all()
    greedy = query(
        log.database,
        "SELECT payload FROM events WHERE position = ?",
        log.positions["all tokens"],
    )
    _, state_id, version = log.place("all tokens")
    counts = [0]
    for state in said["states"]:
        counts.append(counts[-1] + state["places"])
    index = [state["state_id"] for state in said["states"]].index(state_id)
    here = np.arange(counts[-1])
    at = (counts[index] <= here) & (here < counts[index + 1]) & (tensors["version"] == version)
    tokens = json.loads(greedy[0][0])["content"]["tokens"]
    assert tensors["token_id"][at].tolist() == tokens
    assert first[at].tolist() == tokens  # they were drawn at temperature 0


@pytest.mark.asyncio(loop_scope="module")
async def test_a_baseline_that_was_changed_anywhere_is_refused(
    baselines: dict[str, Path], tmp_path: Path
) -> None:
    data = baselines["fine"].read_bytes()
    copy = tmp_path / "copy"
    for at in [*range(0, len(data), 997), *range(12), len(data) - 1]:
        copy.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(NotComparable):
            open_baseline(copy)
    for end in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        copy.write_bytes(data[:end])
        with pytest.raises(NotComparable):
            open_baseline(copy)
    copy.write_bytes(data + b"\0")
    with pytest.raises(NotComparable):
        open_baseline(copy)
    copy.write_bytes(data)
    with open_baseline(copy) as baseline:
        assert baseline.state_ids()
    with pytest.raises(NotComparable, match="cannot be read as a baseline"):
        open_baseline(tmp_path / "none")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_log_that_has_grown_is_held_against_its_baseline_up_to_where_it_was_recorded(
    log: Log, models: Models, baselines: dict[str, Path], tmp_path: Path
) -> None:
    with tampering(log.database, tmp_path / "short.db", rehash=False) as connection:
        keep = log.positions["kept in full"]
        connection.execute("DELETE FROM logits WHERE position > ?", (keep,))
        connection.execute("DELETE FROM events WHERE position > ?", (keep,))
        connection.execute("DELETE FROM states WHERE created_position > ?", (keep,))
    short = await regress(tmp_path / "short.db", models, record=tmp_path / "baseline")
    found = await regress(log.database, models, against=tmp_path / "baseline")
    assert is_unchanged(found)
    assert overall(found).tokens == overall(short).tokens > 0
    with pytest.raises(NotComparable, match="of another history"):
        await regress(tmp_path / "short.db", models, against=baselines["fine"])


@pytest.mark.asyncio(loop_scope="module")
async def test_a_baseline_holds_for_what_was_exported_and_imported(
    log: Log, models: Models, baselines: dict[str, Path], tmp_path: Path
) -> None:
    derived = StateId(log.place("adopted and grown")[1])
    async with await SqliteReader.open(log.database) as reader:
        await export(tmp_path / "log", await Export.of_log(reader))
        await export(tmp_path / "state", await Export.of_states(reader, [(derived, None)]))
    here = await regress(log.database, models, against=baselines["fine"])
    assert await regress(tmp_path / "log", models, against=baselines["fine"]) == here
    only = {"state_ids": (derived,)}
    found = await regress(tmp_path / "state", models, against=baselines["fine"], **only)
    assert is_unchanged(found)
    assert found.log != here.log
    assert overall(found).tokens == replayed(here)[derived].tokens


async def export(path: Path, exported: Export) -> None:
    parts = [part async for part in exported.parts()]
    await asyncio.to_thread(path.write_bytes, b"".join(parts))


@pytest.mark.asyncio(loop_scope="module")
async def test_a_baseline_of_another_log_or_history_is_refused(
    log: Log, models: Models, baselines: dict[str, Path], tmp_path: Path
) -> None:
    with tampering(log.database, tmp_path / "retold.db", rehash=True) as connection:
        edit(connection, log.positions["created"], lambda payload: payload["metadata"].update(a=1))
    with pytest.raises(NotComparable, match="of another history"):
        await regress(tmp_path / "retold.db", models, against=baselines["fine"])
    with tampering(log.database, tmp_path / "other.db", rehash=False) as connection:
        connection.execute("UPDATE log SET log_id = 'another'")
        rehash_chain(connection)
    with pytest.raises(NotComparable, match=r"here [0-9a-f]{64} of log another"):
        await regress(tmp_path / "other.db", models, against=baselines["fine"])
    with tampering(log.database, tmp_path / "removed.db", rehash=False) as connection:
        for table in ("events", "states"):
            connection.execute(
                f"DELETE FROM {table} WHERE state_id = ?", (log.place("generated")[1],)
            )
    with pytest.raises(StateNotFound):
        await regress(tmp_path / "removed.db", models, against=baselines["fine"])


def rewrite(path: Path, copy: Path, change: Callable[[list[Before]], list[Before]]) -> Before:
    """A baseline with other places of its first state; gives the last that it had."""
    said = said_by(path)
    of = said["log_id"], Head(Position(said["position"]), bytes.fromhex(said["hash"]))
    with open_baseline(path) as original, write_baseline(copy, k=64) as writer:
        first, *_ = original.state_ids()
        for state_id in original.state_ids():
            places = original.read(state_id)
            changed = change(places) if state_id == first else places
            writer.add(original.covered(state_id), changed)
        writer.finish(*of)
        return original.read(first)[-1]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_place_that_one_side_lacks_is_named(
    log: Log, models: Models, baselines: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "copy"
    last = rewrite(baselines["fine"], path, lambda places: places)
    assert path.read_bytes() == baselines["fine"].read_bytes()
    place = rf"token position {last.token_position} of version {last.version}, state state-"
    rewrite(baselines["fine"], path, lambda places: places[:-1])
    with pytest.raises(NotComparable, match=f"the baseline lacks token .* {place}"):
        await regress(log.database, models, against=path)
    rewrite(baselines["fine"], path, lambda places: [*places, later(places[-1])])
    place = place.replace(str(last.token_position), str(last.token_position + 1), 1)
    with pytest.raises(NotComparable, match=f"the log lacks token .* {place}"):
        await regress(log.database, models, against=path)


def later(place: Before) -> Before:
    return msgspec.structs.replace(place, token_position=place.token_position + 1)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_baseline_of_one_state_is_held_against_that_state_alone(
    log: Log, models: Models, tmp_path: Path
) -> None:
    sampled, greedy = (StateId(log.place(name)[1]) for name in ("generated", "greedy"))
    await regress(log.database, models, record=tmp_path / "one", state_ids=(sampled,))
    found = await regress(log.database, models, against=tmp_path / "one")
    assert [state.state_id for state in found.states] == [sampled]
    with pytest.raises(NotComparable, match=f"the baseline has no state '{greedy}'"):
        await regress(log.database, models, against=tmp_path / "one", state_ids=(greedy,))
    with pytest.raises(NotComparable, match=r"nothing was replayed: .* possible is "):
        await regress(log.database, models, against=tmp_path / "one", model_id=ModelId("narrow"))


@pytest.mark.asyncio(loop_scope="module")
async def test_a_state_of_the_baseline_that_is_skipped_now_fails(
    log: Log, models: Models, tmp_path: Path
) -> None:
    at = log.positions["generated"]
    with tampering(log.database, tmp_path / "sealed.db", rehash=False) as connection:
        edit(connection, at, seal)
        (columns,) = connection.execute(ROWS, (at - 1, at, 1))
        set_column(connection, at, "hash", row_hash(as_row(columns)))
    await regress(log.database, models, record=tmp_path / "baseline")
    found = await regress(
        tmp_path / "sealed.db", models, against=tmp_path / "baseline", limits=ANYTHING
    )
    (failure,) = found.failures
    state_id = log.place("generated")[1]
    assert failure.startswith(f"{state_id}: the baseline has it, and it was not replayed: ")
    assert (await regress(tmp_path / "sealed.db", models, limits=ANYTHING)).failures == ()
    (case,) = ElementTree.fromstring(reports.junit(found)).findall(".//failure/..")
    assert case.attrib["name"] == state_id
    console = Console(width=200, file=io.StringIO())
    console.print(reports.table(found))
    count = f"replayed {len(found.states) - 1} states, skipped 1"
    assert count in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_state_that_the_list_of_states_hides_is_replayed(
    log: Log, models: Models, tmp_path: Path
) -> None:
    state_id = StateId(log.place("generated")[1])
    with tampering(log.database, tmp_path / "copy.db", rehash=False) as connection:
        connection.execute(
            "UPDATE states SET created_position = -7 WHERE state_id = ?", (state_id,)
        )
        connection.execute("DELETE FROM states WHERE state_id = ?", (log.place("continued")[1],))
    found = await regress(tmp_path / "copy.db", models)
    assert found == await regress(log.database, models)
    assert state_id in replayed(found)


# the command


def run(*arguments: object, **settings: str) -> Result:
    """Run the command in this process."""
    env = {"CACHER_MODEL_NAME": "gpt2", **FAST, **settings}
    return CliRunner().invoke(main, ["regress", *map(str, arguments)], env=env)


def test_the_command_reports_in_every_form_and_exits_with_1_beyond_a_limit(
    log: Log, tmp_path: Path
) -> None:
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "junit", "html")}
    options = [one for kind, path in files.items() for one in (f"--{kind}", path)]
    result = run(log.database, "--dtype", "bfloat16", *options)
    assert result.exit_code == 1, result.output
    report = msgspec.json.decode(files["json"].read_bytes(), type=Regression)
    assert report.failures
    assert all("sampled agreement" in failure for failure in report.failures)
    assert report.failures[0] in re.sub(r"\s+", " ", result.stdout)
    assert "<testsuite" in files["junit"].read_text()
    assert "<html" in files["html"].read_text()


def test_a_baseline_is_recorded_and_compared_with_by_the_command_and_limits_decide(
    log: Log, copied: Path, tmp_path: Path
) -> None:
    baseline = tmp_path / "baseline"
    recorded = run(log.database, "--model", copied, "--dtype", "bfloat16", "--record", baseline)
    assert recorded.exit_code == 0, recorded.output  # although choices changed
    _, state_id, _ = log.place("generated")
    limits = ["--min-sampled-agreement", 0, "--max-kl", 0.1, "--max-logprob-delta", 1]
    only = ["--model", copied, "--state", state_id, "--json", "-"]
    result = run(log.database, "--against", baseline, *only, *limits)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["limits"]["max_kl"], report["limits"]["min_greedy_agreement"]) == (0.1, 1.0)
    assert [state["state_id"] for state in report["states"]] == [state_id]
    assert report["before"] == "the baseline"
    assert report["differences"]["dtype"] == ["bfloat16", "float32"]
    assert report["overall"]["sampled_agreement"] < 1
    assert report["overall"]["max_logprob_delta"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--state", "state-none"], "there is no state 'state-none'"),
        (["--model", "cacher-tiny-sentiment"], "is a classifier"),
        (["--against", "none"], "none cannot be read as a baseline"),
        (["--against", "none", "--record", "some"], "cannot be given together"),
        (["--max-kl", "nan"], "max_kl must be a number of 0 or more, not nan"),
        (["--min-sampled-agreement", "nan"], "must be a number from 0 to 1, not nan"),
        (["--record", "no folder/baseline"], "there is no folder"),
        (["--html", "/dev/null"], "/dev/null is no regular file"),
        (["--device", "cuda"], "CACHER_DEVICE is 'cuda'"),
    ],
)
def test_what_could_not_be_run_exits_with_2_and_says_why(
    log: Log, options: list[str], message: str
) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run(log.database, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize("option", ["--record", "--json", "--junit", "--html"])
def test_the_log_that_is_replayed_is_never_written(log: Log, tmp_path: Path, option: str) -> None:
    database = tmp_path / "log.db"
    shutil.copyfile(log.database, database)
    (tmp_path / "link").symlink_to(database)
    for name in ("log.db", "link", "log.db-wal", "log.db.keys"):
        result = run(database, option, tmp_path / name, "--force")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "belongs to the log" in result.stderr
    assert database.read_bytes() == log.database.read_bytes()


def test_a_baseline_is_replaced_only_if_it_is_forced_and_never_by_a_report(
    log: Log, tmp_path: Path
) -> None:
    baseline = tmp_path / "baseline"
    only = ["--state", log.place("greedy")[1]]
    for options, why in (
        (["--record", baseline], "is there already; --force replaces it"),
        (["--against", baseline, "--json", baseline], "is what the command reads"),
        (["--record", baseline, "--force", "--html", baseline], "is written by another option"),
    ):
        baseline.write_text("kept")
        result = run(log.database, *options, *only)
        assert (result.exit_code, result.stdout) == (2, "")
        assert why in result.stderr
        assert baseline.read_text() == "kept"
    assert run(log.database, "--record", baseline, "--force", *only).exit_code == 0
    with open_baseline(baseline) as opened:
        assert opened.state_ids() == (log.place("greedy")[1],)
    assert os.listdir(tmp_path) == ["baseline"]  # noqa: PTH208


def test_a_file_that_is_no_log_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("This is a story and no database. " * 100)
    result = run(tmp_path / "text.db")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("cacher: ")
