"""A loaded sequence classifier as the application sees it: :class:`domain.models.Classifier`.

A text is computed whole and alone, by transformers' own modules on the engine's one thread, between
two passes of other models. So its shapes are those of the text, whatever else runs. Only linear
layers may use several threads, where the probe finds that this changes no bit; their rows are
padded to a fixed tile. Streams wait for a text as long as it takes: as much as the model's context
holds, at most.
"""

import hashlib
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
import transformers
from torch import Tensor, nn

from domain.analysis.classify import Problem
from domain.content import Fragment
from domain.errors import ModelUnavailable, TooLarge
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, TokenId
from domain.models import Numerics
from infra.engine.devices import compute_exactly
from infra.engine.engine import Engine
from infra.engine.fingerprint import device_name
from infra.engine.forward import Shape, Unsupported
from infra.engine.kv_store import Geometry
from infra.engine.modules.strategy import ModuleStrategy, replace_linears
from infra.engine.options import EngineOptions
from infra.engine.probe import ROUNDING, USE_ANOTHER
from infra.engine.strategies import known
from infra.engine.waiting import done_by, encoded
from infra.models.loader import Loaded

NUMERICS_VERSION: Final = 1
"""Raised whenever the way in which classifiers are computed changes their bits."""

ROW_TILE: Final = 16
"""To a multiple of this the rows of linear layers are padded."""

_LINEARS: Final = ("onednn", "tile")
_PROBED_LENGTHS: Final = (1, 2, 17, 130, 512)
_PROBED_THREADS: Final = (2, 3)


class PaddedLinear(nn.Module):
    """A linear layer that is never given another number of rows than whole tiles."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``(..., in)``; returns ``(..., out)``."""
        rows = x.reshape(-1, x.shape[-1])
        padded = nn.functional.pad(rows, (0, 0, 0, -len(rows) % ROW_TILE))
        result: Tensor = self.inner(padded)[: len(rows)]
        return result.reshape(*x.shape[:-1], -1)


class _PaddedStrategy(ModuleStrategy):
    """Linear layers of another strategy, padded."""

    def __init__(self, inner: ModuleStrategy) -> None:
        super().__init__(inner.threads)
        self.name = inner.name
        self._inner = inner

    def linear(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A :class:`PaddedLinear`."""
        return PaddedLinear(self._inner.linear(weight, bias))


@dataclass(frozen=True)
class _Finding:
    """Whether logits are always the same, a digest of some, and what was found out how."""

    deterministic: bool
    golden: str
    note: str


class SequenceClassifier:
    """A sequence classifier of transformers, run by the engine."""

    model_type: Literal["sequence_classification"] = "sequence_classification"

    def __init__(
        self, model_id: ModelId, loaded: Loaded, engine: Engine, options: EngineOptions
    ) -> None:
        """Prepare and probe the model; takes seconds, so not on the event loop.

        Raises:
            ModelUnavailable: its results are not those of plain transformers.
        """
        self.model_id = model_id
        self.config: dict[str, Any] = loaded.config
        self.vocabulary_size = loaded.vocabulary_size
        self.revision = loaded.revision
        self._tokenizer = loaded.tokenizer
        self._model: Any = loaded.model
        self._engine = engine
        config: Any = self._model.config
        self.labels = tuple(config.id2label[index] for index in range(config.num_labels))
        self.problem = _problem(config)
        self._positions = _positions(loaded)
        self.context_size = self._positions - len(self._tokenizer.closing)
        torch.set_num_threads(1)
        compute_exactly()
        texts = self._probed_texts()
        plain = self._plain_logits(texts)
        _read_to_the_end(config)
        strategy = _linears(options)
        replace_linears(self._model, strategy)
        finding = self._probe(texts, plain, options)
        self.fingerprint = Fingerprint.of(
            {
                "classifier_numerics_version": NUMERICS_VERSION,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "device": device_name(torch.device(options.device)),
                "dtype": str(options.dtype).removeprefix("torch."),
                "strategy": "whole",
                "linears": strategy.name,
                "row_tile": ROW_TILE,
                "golden": finding.golden,
                "deterministic": finding.deterministic,
                **loaded.identity,
            }
        )
        self.numerics = Numerics(
            deterministic=finding.deterministic,
            fingerprint=self.fingerprint.id,
            strategy="whole",
            dtype=str(options.dtype).removeprefix("torch."),
            quantum=ROW_TILE,
            query_tile=1,
            note=f"linear layers of {strategy.name}: {finding.note}",
        )

    async def encode(self, text: str, *, beginning: bool, room: int) -> tuple[TokenId, ...]:
        """Tokens of a text, at the beginning with the special tokens before it, never those after.

        See the port. Long texts are encoded off the event loop.
        """
        tokens = await encoded(self._tokenizer, text, beginning=beginning, room=room)
        closing = len(self._tokenizer.closing) if beginning else 0
        return tokens[: len(tokens) - closing]

    def opening(self) -> tuple[TokenId, ...]:
        """Tokens of a state that begins with nothing: those before any text, else BOS or EOS."""
        tokenizer = self._tokenizer
        tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return tokenizer.opening or tuple(token for token in tokens if token is not None)[:1]

    def fragment(self, before: Sequence[TokenId], tokens: Sequence[TokenId]) -> Fragment:
        """``tokens`` with the text each of them adds after ``before``."""
        return self._tokenizer.fragment(before, tokens)

    async def logits(self, tokens: Sequence[TokenId]) -> tuple[float, ...]:
        """The logit of each class for a text; see the port."""
        whole = self._tokenizer.enclosed(tokens)
        if len(whole) > self._positions:
            raise TooLarge(f"a text of {len(whole)} tokens is longer than {self._positions}")
        gone = threading.Event()

        def compute() -> tuple[float, ...]:
            return () if gone.is_set() else tuple(self._compute(whole).tolist())

        try:
            return await done_by(self._engine, compute)
        finally:
            gone.set()

    @torch.inference_mode()
    def _compute(self, tokens: Sequence[TokenId]) -> Tensor:
        """Logits ``(labels,)`` in float32, on the CPU, of a text with all its special tokens."""
        device = self._model.device
        ids = torch.tensor([tuple(tokens)], device=device)
        found = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        logits: Tensor = found.float().cpu()
        if logits.shape != (1, len(self.labels)):
            raise ValueError(f"{len(self.labels)} classes have logits {tuple(logits.shape)}")
        return logits[0]

    # the probe

    def _probed_texts(self) -> list[tuple[TokenId, ...]]:
        """Random texts up to the end of the context, without tokens that pad others."""
        tokenizer, pad = self._tokenizer, self._model.config.pad_token_id
        known = [TokenId(token) for token in range(self.vocabulary_size) if token != pad]
        most = self.context_size - len(tokenizer.opening)
        counts = sorted({min(count, most) for count in _PROBED_LENGTHS})
        return [tokenizer.enclosed(random.Random(n).choices(known, k=n)) for n in counts]

    def _plain_logits(self, texts: Sequence[Sequence[TokenId]]) -> list[Tensor]:
        """Logits by plain transformers: before the model is changed."""
        try:
            return [self._compute(text) for text in texts]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = f"its modelling code is not supported: {error}"
            raise ModelUnavailable(self.model_id, reason, USE_ANOTHER) from error

    def _probe(
        self, texts: Sequence[Sequence[TokenId]], plain: Sequence[Tensor], options: EngineOptions
    ) -> _Finding:
        """Hold the model against plain transformers, and against itself on other threads.

        It uses several from then on if that changes no bit, else one.

        Raises:
            ModelUnavailable: the logits differ from those of plain transformers by more than
                rounding.
        """
        found = self._computed_by(1, texts)
        note = f"probed up to {max(map(len, texts))} tokens, by one thread"
        deterministic = _equal(found, self._computed_by(1, texts))
        if not deterministic:
            note = "logits differ when computed again"
        elif options.threads > 1 and all(
            _equal(found, self._computed_by(threads, texts))
            for threads in (*_PROBED_THREADS, options.threads)
        ):
            note = f"probed up to {max(map(len, texts))} tokens, by several threads"
        else:
            self._use(1)
        golden = hashlib.sha256()
        for expected, actual in zip(plain, found, strict=True):
            golden.update(actual.numpy().tobytes())
            difference = (actual - expected).abs().max().item()
            allowed = ROUNDING[options.dtype] * max(1.0, expected.abs().max().item())
            if not difference <= allowed:
                raise ModelUnavailable(
                    self.model_id,
                    f"its logits differ from plain transformers by {difference:.2g} (allowed"
                    f" {allowed:.2g})",
                    USE_ANOTHER,
                )
        return _Finding(deterministic, golden.hexdigest(), note)

    def _computed_by(self, threads: int, texts: Sequence[Sequence[TokenId]]) -> list[Tensor]:
        self._use(threads)
        return [self._compute(text) for text in texts]

    def _use(self, threads: int) -> None:
        """Have linear layers use so many threads from now on."""
        for module in self._model.modules():
            if isinstance(module, PaddedLinear):
                module.inner.threads = threads


def _equal(found: Sequence[Tensor], again: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, found, again))


def _problem(config: Any) -> Problem:
    """What a model's logits mean; as in transformers, a single one is a value."""
    if config.problem_type in get_args(Problem):
        problem: Problem = config.problem_type
        return problem
    return "regression" if config.num_labels == 1 else "single_label_classification"


def _positions(loaded: Loaded) -> int:
    """How many tokens a model has positions for: some families leave out those up to padding."""
    sizes = [
        module.num_embeddings - module.padding_idx - 1
        for name, module in loaded.model.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(module, nn.Embedding)
        and module.padding_idx is not None
    ]
    return min([loaded.context_size, *sizes])


def _read_to_the_end(config: Any) -> None:
    """Have a decoder look at the last token of a text, though it be one that pads others.

    What it computes on the way is not kept.
    """
    config.use_cache = False
    if not config.is_encoder_decoder:
        config.get_text_config().pad_token_id = config.pad_token_id = None


def _linears(options: EngineOptions) -> ModuleStrategy:
    """Linear layers of the strategy that was chosen, where it has some; else the best there are."""
    shape = Shape(
        geometry=Geometry(1, 1, 1, 1),
        dtype=options.dtype,
        device=torch.device(options.device),
        context=1,
        vocabulary=1,
    )
    for name in (options.strategy, *_LINEARS):
        kind = known().get(name)
        if kind is None or not issubclass(kind, ModuleStrategy):
            continue
        strategy = kind(options.threads)
        try:
            strategy.check(shape)
        except Unsupported:
            continue
        return _PaddedStrategy(strategy)
    raise AssertionError("tiles need nothing of the machine")
