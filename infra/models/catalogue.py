"""Names of models and where their files come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

from domain.errors import ModelNotFound
from domain.ids import ModelId

_EMBEDDED: Final = Path(str(files("infra.models"))) / "embedded"
_DESCRIPTIONS: Final = {
    ModelId("cacher-tiny"): "Ships with Cacher: a small GPT-2 that writes little stories",
    ModelId("cacher-tiny-sentiment"): "Ships with Cacher: tells glad little stories from sad ones",
}
ANY: Final = "*"
DEFAULT_HUB_MODEL: Final = ModelId("gpt2")


@dataclass(frozen=True)
class Source:
    """Where a model comes from. ``location`` is a folder, or a name on the hub."""

    model_id: ModelId
    kind: Literal["embedded", "folder", "hub"]
    location: str
    description: str


def source_of(name: str) -> Source:
    """The source a setting names: an embedded model, a folder, or a name on the hub.

    A folder is known to clients by its last component alone.
    """
    model_id = ModelId(name)
    if model_id in _DESCRIPTIONS:
        return Source(model_id, "embedded", str(_EMBEDDED / name), _DESCRIPTIONS[model_id])
    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        return Source(ModelId(folder.name), "folder", str(folder), "A folder on the server")
    return Source(model_id, "hub", name, "From the Hugging Face hub")


class Catalogue:
    """The models that clients may name: the default, the embedded ones, and what is allowed."""

    def __init__(self, default: str, allowed: Sequence[str]) -> None:
        names = (default, DEFAULT_HUB_MODEL, *_DESCRIPTIONS, *(n for n in allowed if n != ANY))
        self._any_hub_name = ANY in allowed
        self._sources = {source.model_id: source for source in map(source_of, names)}
        self.default = source_of(default).model_id

    def sources(self) -> tuple[Source, ...]:
        """Every source that has a name here."""
        return tuple(self._sources.values())

    def source(self, model_id: ModelId) -> Source:
        """The source of a model that a client named.

        Raises:
            ModelNotFound: clients may not name it.
        """
        source = self._sources.get(model_id)
        if source is not None:
            return source
        if self._any_hub_name:
            return Source(model_id, "hub", model_id, "From the Hugging Face hub")
        raise ModelNotFound(model_id, tuple(self._sources))
