"""The models that may be named here, loaded on first use: :class:`domain.models.Models`."""

import asyncio
import functools
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from domain.config import ModelType
from domain.errors import QueueFull
from domain.ids import ModelId
from domain.models import CacheCounters, Classifier, LanguageModel, ModelInfo, Numerics
from infra.models.catalogue import Catalogue, Source
from infra.models.config_file import is_classifier, read_config


class ModelStore:
    """Loads models, each once, and keeps at most ``max_models``: least recently used goes first.

    A model that is let go finishes the work it has; its memory is freed after that. ``load`` is
    called on ``thread``, one source after the other: slow downloads hold up nothing but other
    downloads.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        load: Callable[[Source], LanguageModel | Classifier],
        thread: ThreadPoolExecutor,
        *,
        max_models: int,
    ) -> None:
        self._catalogue = catalogue
        self._load = load
        self._thread = thread
        self._max_models = max_models
        self._models: OrderedDict[ModelId, asyncio.Future[LanguageModel | Classifier]] = (
            OrderedDict()
        )

    @property
    def default(self) -> ModelId:
        """The model of states whose client names none."""
        return self._catalogue.default

    def known(self) -> list[ModelInfo]:
        """Every model that clients may name (hub names allowed by ``*`` excepted)."""
        return [self._info(source) for source in self._catalogue.sources()]

    def info(self, model_id: ModelId) -> ModelInfo:
        """One of them."""
        return self._info(self._catalogue.source(model_id))

    async def get(self, model_id: ModelId) -> LanguageModel | Classifier:
        """The model, loaded if it was not. Requests for one model wait for one loading.

        Raises:
            ModelNotFound, ModelUnavailable: as the port says.
            QueueFull: too many other models are being loaded.
        """
        source = self._catalogue.source(model_id)
        task = self._models.get(model_id)
        if task is None:
            loading = sum(not other.done() for other in self._models.values())
            if loading >= self._max_models:
                raise QueueFull(loading)
            task = asyncio.ensure_future(
                asyncio.get_running_loop().run_in_executor(self._thread, self._load, source)
            )
            task.add_done_callback(functools.partial(self._loaded, model_id))
            self._models[model_id] = task
        self._models.move_to_end(model_id)
        return await asyncio.shield(task)

    async def describe(self, model_id: ModelId) -> tuple[dict[str, Any], Numerics]:
        """A model's ``config.json`` and its numerics; loads it."""
        model = await self.get(model_id)
        return model.config, model.numerics

    def counters(self) -> dict[ModelId, CacheCounters]:
        """Counters of the KV cache of every loaded model that has one."""
        return {model.model_id: model.counters() for model in self._language_models()}

    async def forget(self) -> None:
        """Drop every block of every loaded model's KV cache that no running work holds."""
        for model in self._language_models():
            await model.forget()

    def _language_models(self) -> list[LanguageModel]:
        """Those that are loaded."""
        loaded = [task.result() for task in self._models.values() if _ready(task)]
        return [model for model in loaded if model.model_type == "causal_lm"]

    def _loaded(
        self, model_id: ModelId, task: "asyncio.Future[LanguageModel | Classifier]"
    ) -> None:
        """Forget a model that could not be loaded; let others go for one that could."""
        if not _ready(task):
            del self._models[model_id]
            return
        self._models.move_to_end(model_id)
        ready = [other for other in self._models if _ready(self._models[other])]
        for other in ready[: max(0, len(ready) - self._max_models)]:
            del self._models[other]

    def _info(self, source: Source) -> ModelInfo:
        task = self._models.get(source.model_id)
        loaded = task.result() if task is not None and _ready(task) else None
        return ModelInfo(
            model_id=source.model_id,
            description=source.description,
            model_type=_told_type(source) if loaded is None else loaded.model_type,
            loaded=loaded is not None,
            embedded=source.kind == "embedded",
        )


def _told_type(source: Source) -> ModelType | None:
    """The type that a model's config tells, where that needs no download."""
    config = read_config(source)
    if config is None:
        return None
    return "sequence_classification" if is_classifier(config) else "causal_lm"


def _ready(task: "asyncio.Future[LanguageModel | Classifier]") -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
