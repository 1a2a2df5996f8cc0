"""Does a loaded model keep the numerics contract on this machine? Tried, not believed.

One text is computed in one prefill, token by token, in odd chunks and among other texts; the
logits and every K/V entry must be equal bit for bit. The text crosses each length at which a model
may change its behaviour: the edge of a block, a sliding window, the end of the context.
"""

import hashlib
import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from domain.errors import ModelUnavailable
from domain.ids import ModelId
from infra.engine.blocks import BLOCK_TOKENS, blocks_for
from infra.engine.executor import Executor
from infra.engine.forward import Prepared
from infra.engine.kv_store import KVStore
from infra.engine.scheduler import Sequence, Slice

MAX_PROBED_TOKENS: Final = 2048
_SHORT: Final = BLOCK_TOKENS + 9
_CHUNK: Final = 192
_PLAIN: Final = 160
ROUNDING: Final = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How far logits may be from those of plain transformers, for each unit of the largest of them."""
USE_ANOTHER: Final = "Use a model of another family"


@dataclass(frozen=True)
class Finding:
    """Whether the contract held, where it first did not, and a digest of the reference bits."""

    failure: str | None
    golden: str
    tokens: int


def probe(prepared: Prepared, config: dict[str, Any], vocabulary: int, context: int) -> Finding:
    """Run the contract on a prepared model."""
    length = min(context, MAX_PROBED_TOKENS)
    tokens = _random_tokens(length, vocabulary)
    bench = _Bench(prepared, length)
    text = bench.text(tokens)
    short = min(_SHORT, length)
    golden = hashlib.sha256()

    logits = bench.compute(text, [short], wanted=0)
    k, v = bench.kv(text, short)
    for tensor in (logits, k, v):
        golden.update(tensor.float().numpy().tobytes())
    failure = None
    for arm, cuts, others in (
        ("token by token", [1] * short, []),
        ("in chunks of 7", [7] * (short // 7) + [short % 7], []),
        ("among other texts", [1, 5, 1, 1, short - 9, 1], bench.companions(vocabulary, short)),
    ):
        again = bench.text(tokens[:short])
        got = bench.compute(again, [cut for cut in cuts if cut], wanted=0, others=others)
        failure = failure or _difference(
            arm, ("logits", "k", "v"), (logits, k, v), (got, *bench.kv(again, short))
        )

    bench.compute(text, _chunks(length), wanted=length)
    for edge in sorted({length - 2, *_windows(config, length)}):
        span = range(max(0, edge - 2), min(length, edge + 2))
        together = bench.compute(text, [len(span)], wanted=span.start, start=span.start)
        alone = bench.compute(text, [1] * len(span), wanted=span.start, start=span.start)
        golden.update(together.numpy().tobytes())
        failure = failure or _difference(f"near token {edge}", ("logits",), (together,), (alone,))
    k, v = bench.kv(text, length)
    again = bench.text(tokens)
    bench.compute(again, _chunks(length, 129), wanted=length)
    failure = failure or _difference(
        "in chunks of 129", ("k", "v"), (k, v), bench.kv(again, length)
    )
    return Finding(failure, golden.hexdigest(), length)


def plain_logits(model: Any, config: dict[str, Any], vocabulary: int, context: int) -> Tensor:
    """Logits of a text by plain transformers: call before the model is prepared.

    The text is long enough to leave a sliding window, up to ``MAX_PROBED_TOKENS``.
    """
    window = max(_windows(config, MAX_PROBED_TOKENS), default=0)
    length = min(context, window + _PLAIN)
    with torch.inference_mode():
        tokens = torch.tensor([_random_tokens(length, vocabulary)], device=model.device)
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits[0].float().cpu()


def check_against_plain(
    model_id: ModelId, prepared: Prepared, plain: Tensor, vocabulary: int
) -> None:
    """Hold a prepared model against plain transformers.

    Raises:
        ModelUnavailable: the logits differ by more than rounding; the model's attention does
            something that is not supported.
        torch.OutOfMemoryError: a GPU has no room for it.
    """
    bench = _Bench(prepared, len(plain))
    text = bench.text(_random_tokens(len(plain), vocabulary))
    # In three cuts: a model that goes on with attention of its own sees only the last one.
    half = len(plain) // 2
    cuts = [cut for cut in (half, 1, len(plain) - half - 1) if cut]
    try:
        difference = (bench.compute(text, cuts, wanted=0) - plain).abs().max().item()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ModelUnavailable(
            model_id, f"its modelling code is not supported: {error}", USE_ANOTHER
        ) from error
    allowed = ROUNDING[prepared.dtype] * max(1.0, plain.abs().max().item())
    if not difference <= allowed:
        raise ModelUnavailable(
            model_id,
            f"its logits differ from plain transformers by {difference:.2g} (allowed"
            f" {allowed:.2g}): its attention does something that is not supported",
            USE_ANOTHER,
        )


def _random_tokens(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(vocabulary), k=count)


def _windows(config: dict[str, Any], length: int) -> set[int]:
    window = config.get("sliding_window")
    return {window} if isinstance(window, int) and window < length else set()


def _chunks(length: int, size: int = _CHUNK) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]


def _difference(
    arm: str, names: Seq[str], expected: Seq[Tensor], actual: Seq[Tensor]
) -> str | None:
    for name, a, b in zip(names, expected, actual, strict=True):
        if not torch.equal(a, b):
            return f"{name} differ when computed {arm}"
    return None


class _Bench:
    """A store of its own in which texts are computed in given cuts."""

    def __init__(self, prepared: Prepared, length: int) -> None:
        blocks = 1 + 2 * blocks_for(length) + 6 * blocks_for(_SHORT)
        store = KVStore(prepared.geometry, blocks, prepared.dtype, device=prepared.shape.device)
        self._executor = Executor(prepared, store)
        self._free = iter(range(1, blocks))

    def text(self, tokens: list[int]) -> Sequence:
        table = [next(self._free) for _ in range(blocks_for(len(tokens)))]
        return Sequence(tokens, len(tokens), 0, None, table=table)

    def companions(self, vocabulary: int, length: int) -> list[Sequence]:
        sizes = (length, 3, length - 2)
        return [self.text(_random_tokens(n, vocabulary, seed=n + 1)) for n in sizes]

    def compute(
        self,
        text: Sequence,
        cuts: Seq[int],
        *,
        wanted: int,
        start: int = 0,
        others: Seq[Sequence] = (),
    ) -> Tensor:
        """Logits of ``text`` from position ``wanted`` on, computed cut by cut.

        Each pass also holds other texts: the first runs ahead by one row, the others by two, in
        turns before and after ``text``.
        """
        text.first_wanted = wanted
        parts: list[Tensor] = []
        for number, cut in enumerate(cuts):
            piece = Slice(text, start, cut)
            slices = [
                Slice(o, number, 1 + (i > 0))
                for i, o in enumerate(others)
                if number + 2 <= len(o.tokens)
            ]
            place = number % (len(slices) + 1)
            before = sum(len(s.wanted) for s in slices[:place])
            logits = self._executor.run([*slices[:place], piece, *slices[place:]])
            parts.append(logits[before : before + len(piece.wanted)])
            start += cut
        parts = [part for part in parts if len(part)]
        return torch.cat(parts) if parts else torch.empty(0)

    def kv(self, text: Sequence, tokens: int) -> tuple[Tensor, Tensor]:
        return self._executor.store.read(text.table, tokens)
