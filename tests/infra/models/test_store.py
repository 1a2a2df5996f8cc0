"""Models are loaded once, on first use, and only so many stay."""

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from domain.errors import ModelNotFound, ModelUnavailable
from domain.ids import ModelId
from domain.models import ModelInfo
from infra.engine.loading import Loading
from infra.models.catalogue import Catalogue
from infra.models.store import ModelStore
from tests.infra.engine import small_models
from tests.infra.engine.asking import GREEDY, request, steps

Copy = Callable[[str], Path]
A, B, C = (ModelId(name) for name in "abc")


@pytest.fixture
def engine() -> Iterator[Loading]:
    loading = Loading(small_models.options())
    yield loading
    loading.close()


def store_of(
    engine: Loading,
    *folders: Path,
    default: str = "cacher-tiny",
    allowed: Sequence[str] = (),
    max_models: int = 2,
) -> ModelStore:
    catalogue = Catalogue(default, [*map(str, folders), *allowed])
    return ModelStore(catalogue, engine.load, ThreadPoolExecutor(1), max_models=max_models)


def loaded(store: ModelStore) -> set[str]:
    return {str(info.model_id) for info in store.known() if info.loaded}


async def test_the_models_of_a_fresh_server_are_known_without_loading_them(
    engine: Loading,
) -> None:
    store = store_of(engine)
    known = {str(info.model_id): info for info in store.known()}
    assert known["cacher-tiny"] == ModelInfo(
        model_id=ModelId("cacher-tiny"),
        description="Ships with Cacher: a small GPT-2 that writes little stories",
        model_type="causal_lm",
        loaded=False,
        embedded=True,
    )
    assert known["cacher-tiny-sentiment"].model_type == "sequence_classification"
    assert (known["gpt2"].model_type, known["gpt2"].embedded) == (None, False)
    assert store.default == "cacher-tiny"
    assert store.counters() == {}


async def test_requests_for_one_model_wait_for_one_loading(engine: Loading, copy: Copy) -> None:
    store = store_of(engine, copy("a"))
    first, *others = await asyncio.gather(*(store.get(A) for _ in range(5)))
    assert all(other is first for other in others)
    assert await store.get(A) is first
    assert loaded(store) == {"a"}
    assert store.counters().keys() == {A}
    assert store.info(A).loaded


async def test_one_who_gives_up_waiting_does_not_stop_the_loading(
    engine: Loading, copy: Copy
) -> None:
    store = store_of(engine, copy("a"))
    impatient = asyncio.create_task(store.get(A))
    patient = asyncio.create_task(store.get(A))
    await asyncio.sleep(0)
    impatient.cancel()
    assert (await patient).model_id == A
    with pytest.raises(asyncio.CancelledError):
        await impatient


async def test_only_so_many_models_stay_and_the_one_not_used_for_longest_goes(
    engine: Loading, copy: Copy
) -> None:
    store = store_of(engine, copy("a"), copy("b"), copy("c"), max_models=2)
    a = await store.get(A)
    await store.get(B)
    await store.get(A)
    await store.get(C)
    assert loaded(store) == {"a", "c"}
    assert await store.get(A) is a


async def test_a_model_that_was_let_go_finishes_its_work(engine: Loading, copy: Copy) -> None:
    store = store_of(engine, copy("a"), copy("b"), max_models=1)
    a, asked = await store.get(A), request([5, 6, 7], 40, sampling=GREEDY)
    expected = await steps(a, asked)
    working = asyncio.create_task(steps(a, asked))
    await store.get(B)
    assert loaded(store) == {"b"}
    assert await working == expected
    again = await store.get(A)
    assert again is not a
    assert await steps(again, asked) == expected


async def test_a_model_that_cannot_be_had_says_why_and_costs_the_others_nothing(
    engine: Loading, copy: Copy, hub_cache: Path
) -> None:
    store = store_of(engine, copy("a"), max_models=1)
    a = await store.get(A)
    for _ in range(2):
        with pytest.raises(ModelUnavailable, match=r"'gpt2'.*the embedded model 'cacher-tiny'"):
            await store.get(ModelId("gpt2"))
    assert loaded(store) == {"a"}
    assert await store.get(A) is a
    assert store.info(ModelId("gpt2")).model_type is None


async def test_a_folder_is_tried_again_once_it_is_mended(
    engine: Loading, copy: Copy, saved: Path
) -> None:
    folder = copy("a")
    (folder / "model.safetensors").write_bytes(b"broken")
    store = store_of(engine, folder)
    with pytest.raises(ModelUnavailable, match="not usable"):
        await store.get(A)
    shutil.copy(saved / "model.safetensors", folder)
    assert (await store.get(A)).numerics.deterministic


async def test_a_name_that_clients_may_not_use_is_not_found(engine: Loading) -> None:
    store = store_of(engine)
    for name in ("no-such", "/etc", "../x"):
        for ask in (store.get, store.describe):
            with pytest.raises(ModelNotFound):
                await ask(ModelId(name))
        with pytest.raises(ModelNotFound):
            store.info(ModelId(name))


async def test_under_any_hub_name_the_files_of_the_server_stay_out_of_reach(
    engine: Loading, saved: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    store = store_of(engine, allowed=["*"])
    for name in (str(saved), saved.name, f"./{saved.name}", f"../{saved.parent.name}/{saved.name}"):
        with pytest.raises(ModelUnavailable):
            await store.get(ModelId(name))
    assert loaded(store) == set()


async def test_a_classifier_is_one_of_the_models_and_has_no_cache(
    engine: Loading, copy: Copy
) -> None:
    store = store_of(engine, copy("a"), max_models=2)
    sentiment = ModelId("cacher-tiny-sentiment")
    config, numerics = await store.describe(sentiment)
    model = await store.get(sentiment)
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert numerics == model.numerics
    assert (numerics.deterministic, numerics.strategy) == (True, "whole")
    assert model.model_type == store.info(sentiment).model_type == "sequence_classification"
    await store.get(A)
    assert store.counters().keys() == {A}
    await store.forget()
    assert loaded(store) == {"a", "cacher-tiny-sentiment"}


async def test_a_model_is_described_by_its_own_config_and_what_it_claims(
    engine: Loading, copy: Copy
) -> None:
    store = store_of(engine, copy("a"))
    config, numerics = await store.describe(A)
    assert config["n_embd"] == 32
    assert numerics is not None
    assert numerics == (await store.get(A)).numerics
    assert (numerics.deterministic, numerics.dtype, numerics.strategy) == (
        True,
        "float32",
        "strict",
    )
