"""Which models clients may name, and where their files come from."""

from pathlib import Path

import pytest

from domain.errors import ModelNotFound
from domain.ids import ModelId
from infra.models.catalogue import Catalogue, source_of

PATHS = ["/etc", "../x", "./x", "~", "", ".", "x/../../etc", "cacher-tiny/../cacher-tiny"]


def names(catalogue: Catalogue) -> set[str]:
    return {str(source.model_id) for source in catalogue.sources()}


def test_without_settings_clients_may_name_the_default_the_embedded_models_and_gpt2() -> None:
    catalogue = Catalogue("cacher-tiny", [])
    assert names(catalogue) == {"cacher-tiny", "cacher-tiny-sentiment", "gpt2"}
    assert catalogue.default == "cacher-tiny"
    assert catalogue.source(ModelId("cacher-tiny")).kind == "embedded"
    assert catalogue.source(ModelId("gpt2")).kind == "hub"


def test_a_setting_allows_more() -> None:
    catalogue = Catalogue("someone/large", ["someone/other"])
    assert {"someone/large", "someone/other"} < names(catalogue)
    assert catalogue.default == "someone/large"


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ModelNotFound, match=r"'no-such'.*gpt2.*CACHER_ALLOWED_MODELS") as caught:
        Catalogue("cacher-tiny", []).source(ModelId("no-such"))
    assert set(caught.value.facts["allowed"]) == {"cacher-tiny", "cacher-tiny-sentiment", "gpt2"}


@pytest.mark.parametrize("path", PATHS)
def test_a_client_cannot_name_a_path(path: str) -> None:
    with pytest.raises(ModelNotFound):
        Catalogue("cacher-tiny", []).source(ModelId(path))


@pytest.mark.parametrize("path", PATHS)
def test_where_any_hub_name_is_allowed_a_path_is_only_ever_a_hub_name(path: str) -> None:
    source = Catalogue("cacher-tiny", ["*"]).source(ModelId(path))
    assert (source.kind, source.location) == ("hub", path)


def test_a_folder_comes_in_by_settings_and_is_known_by_its_last_part(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for catalogue in (Catalogue(str(folder), []), Catalogue("cacher-tiny", [str(folder)])):
        source = catalogue.source(ModelId("mine"))
        assert (source.kind, source.location) == ("folder", str(folder))
        with pytest.raises(ModelNotFound):
            catalogue.source(ModelId(str(folder)))
    assert Catalogue(str(folder), []).default == "mine"


def test_any_hub_name_does_not_mean_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Catalogue("cacher-tiny", ["*"]).source(ModelId("beside")).kind == "hub"
    assert source_of("beside").kind == "folder"


def test_an_embedded_name_is_the_model_that_ships_whatever_lies_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cacher-tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert source_of("cacher-tiny").kind == "embedded"
