"""Models as the application needs them, as protocols; ``infra`` makes them real."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal, Protocol

from msgspec import Struct

from domain.analysis.classify import Problem
from domain.analysis.parameters import Inside
from domain.analysis.result import Result
from domain.config import Constraint, ModelType, StateConfig
from domain.content import Fragment, ToldToken
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, TokenId
from domain.work import BeamRequest, BeamsFound, GenerationRequest, Scored, ScoreRequest, Step

Tier = Literal["device", "host", "none"]
"""Where K/V is: in the memory of the device that computes, in the host's, or nowhere."""


class CacheCounters(Struct, frozen=True, kw_only=True):
    """The KV cache of one model.

    Now: blocks of the device in all, those that running sequences hold, those that can be found by
    content (held or not), and those that are neither. ``blocks_shared`` is how many more would be
    held if sequences shared none. Where the device is the CPU there are no host blocks.
    ``sequences`` run or wait for a place in the batch.

    Since the model was loaded, in blocks: ``hits`` were found instead of computed (``restores`` of
    them on the host), ``misses`` had to be computed, ``evictions`` had to leave the device.
    """

    block_tokens: int
    block_bytes: int
    blocks_capacity: int
    blocks_held: int
    blocks_cached: int
    blocks_free: int
    blocks_shared: int
    host_blocks_capacity: int
    host_blocks_cached: int
    hits: int
    misses: int
    evictions: int
    restores: int
    sequences: int
    sequences_waiting: int


class ModelInfo(Struct, frozen=True, kw_only=True):
    """What is known of a model without loading it."""

    model_id: ModelId
    description: str
    model_type: ModelType | None
    loaded: bool
    embedded: bool


class Numerics(Struct, frozen=True, kw_only=True):
    """What a loaded model claims about its bits, and how they are made."""

    deterministic: bool
    fingerprint: str
    strategy: str
    dtype: str
    quantum: int
    query_tile: int
    note: str | None


class Dimensions(Struct, frozen=True, kw_only=True):
    """Sizes of a model: its layers, query heads, K/V heads, and the width of hidden states."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int


class Model(Protocol):
    """What every loaded model has. All work runs on the engine's thread."""

    model_id: ModelId
    revision: str | None
    context_size: int
    vocabulary_size: int
    config: dict[str, Any]
    numerics: Numerics
    fingerprint: Fingerprint

    async def encode(self, text: str, *, beginning: bool, room: int) -> tuple[TokenId, ...]:
        """Tokens of a text; at the beginning with the special tokens the model expects.

        Raises:
            TooLarge: the text cannot be ``room`` tokens or fewer; found without encoding it.
        """

    def opening(self) -> tuple[TokenId, ...]:
        """Tokens of a state that begins with nothing: BOS, or EOS where there is no BOS."""

    def fragment(self, before: Sequence[TokenId], tokens: Sequence[TokenId]) -> Fragment:
        """``tokens`` with the text each of them adds after ``before``."""


class Classifier(Model, Protocol):
    """A loaded sequence classifier: says of a whole text which class it belongs to.

    ``labels`` are the names of its classes. A state of it holds a text without the special tokens
    that its tokenizer puts at the end: they belong to the question, so that text can be appended.
    """

    model_type: Literal["sequence_classification"]
    labels: tuple[str, ...]
    problem: Problem

    async def logits(self, tokens: Sequence[TokenId]) -> tuple[float, ...]:
        """The logit (float32) of each class for a text.

        Special tokens that the tokenizer puts around a text are added where the tokens do not begin
        or end with them. A pure function of the tokens, computed whole: nothing is kept of it.

        Raises:
            TooLarge: the text is longer than the model's context.
        """


class LanguageModel(Model, Protocol):
    """A loaded causal language model."""

    model_type: Literal["causal_lm"]
    dimensions: Dimensions
    eos_token_ids: frozenset[TokenId]
    max_beams: int
    max_result_bytes: int

    def told(self, before: Sequence[TokenId], tokens: Sequence[TokenId]) -> list[ToldToken]:
        """Each of ``tokens`` with the text that it would add, by itself, after ``before``."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
        """Draw tokens one by one. Closing the iterator ends the work and frees its memory."""

    async def search(self, request: BeamRequest) -> BeamsFound:
        """Continue a text by beam search. Cancelling it ends the work and frees its memory."""

    async def score(
        self, requests: Sequence[ScoreRequest], *, private: bool = False
    ) -> list[Scored]:
        """Score texts at prefill speed, each as asked.

        ``private`` uses no KV block that this call did not compute itself, and leaves none
        behind; tokens that several of the texts begin with are computed once.

        Raises:
            TooLarge: a text is longer than the model's context.
        """

    async def largest(self, rows: Sequence[bytes], k: int) -> list[bytes]:
        """The ``k`` largest logits of rows that were kept ``full``, as ``top_k`` keeps them.

        Raises:
            InvalidInput: they are no such rows.
        """

    async def look(
        self,
        tokens: Sequence[TokenId],
        config: StateConfig,
        parameters: Inside,
        *,
        private: bool = False,
    ) -> Result:
        """Look inside a text that a state with ``config`` holds.

        The text is computed like any other, among others; ``private`` is as for :meth:`score`.

        Raises:
            InvalidInput: a layer, head, position or token that there is not; names what there is.
            ResultTooLarge: what is asked for does not fit into an answer; says how to ask for less.
        """

    async def check_constraint(self, constraint: Constraint) -> None:
        """Make sure that a text can be held to a constraint.

        Raises:
            InvalidInput: it is malformed, too large, or no text satisfies it; says where.
        """

    def fulfils(self, constraint: Constraint, tokens: Sequence[TokenId]) -> bool:
        """Whether tokens satisfy a constraint that allows nothing after them."""

    def tokens_hot(self, tokens: Sequence[TokenId]) -> int:
        """How many leading tokens have their K/V in the cache."""

    def tier(self, tokens: Sequence[TokenId]) -> Tier:
        """The slowest memory that a hot token's K/V would come from."""

    def counters(self) -> CacheCounters:
        """Counters of the KV cache."""

    async def forget(self) -> None:
        """Drop every block of the cache that no running work holds."""


class Models(Protocol):
    """The models that may be named here."""

    def known(self) -> list[ModelInfo]:
        """Every model that clients may name (hub names allowed by ``*`` excepted)."""

    def info(self, model_id: ModelId) -> ModelInfo:
        """One of them.

        Raises:
            ModelNotFound: clients may not name it.
        """

    async def describe(self, model_id: ModelId) -> tuple[dict[str, Any], Numerics]:
        """A model's ``config.json`` and its numerics; loads it.

        Raises:
            ModelNotFound, ModelUnavailable: as for :meth:`get`.
        """

    def counters(self) -> dict[ModelId, CacheCounters]:
        """Counters of the KV cache of every loaded model that has one."""

    async def forget(self) -> None:
        """Drop every block of every loaded model's KV cache that no running work holds."""

    async def get(self, model_id: ModelId) -> LanguageModel | Classifier:
        """The model, loaded if it was not.

        Raises:
            ModelNotFound: clients may not name it.
            ModelUnavailable: it cannot be loaded; says why and what would work.
        """
