"""The engine and what loads models onto it. To import this takes seconds: it imports torch."""

import torch

from domain.errors import ModelUnavailable
from infra.engine.classifier import SequenceClassifier
from infra.engine.engine import Engine
from infra.engine.language_model import TransformersModel
from infra.engine.options import EngineOptions
from infra.models import loader
from infra.models.catalogue import Source
from infra.models.config_file import is_classifier


class Loading:
    """Loads models onto an engine of its own, which runs until this is closed."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._engine = Engine()
        self._engine.__enter__()

    def close(self) -> None:
        """End the engine, once its step is done."""
        self._engine.__exit__()

    def load(self, source: Source) -> TransformersModel | SequenceClassifier:
        """A model, ready to run; takes seconds.

        Raises:
            ModelUnavailable: as :func:`infra.models.loader.load` says.
        """
        try:
            loaded = loader.load(source, self._options.dtype, self._options.device)
            if is_classifier(loaded.config):
                return SequenceClassifier(source.model_id, loaded, self._engine, self._options)
            return TransformersModel(source.model_id, loaded, self._engine, self._options)
        except torch.OutOfMemoryError as error:
            raise ModelUnavailable(
                source.model_id,
                "the GPU has no room for it and its KV cache",
                "Lower CACHER_HOT_CACHE_BYTES or CACHER_MAX_MODELS, or set CACHER_DTYPE=bfloat16",
            ) from error
