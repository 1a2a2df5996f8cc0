"""Looking on while a text is computed."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from infra.engine.forward import Site, Weighing
from infra.engine.kv_store import KVStore, in_order
from infra.engine.observing import Look, Seen
from infra.engine.sampling.sampler import Row
from infra.engine.scheduler import Sequence as Text
from infra.engine.scheduler import Slice


class Observation:
    """Computes a text and keeps what is to be seen of it, in copies.

    A text that is edited has no ``root``: it neither finds blocks nor leaves any. ``deliver`` gets
    this job once it is done, or the error that ended the work.
    """

    def __init__(
        self,
        look: Look,
        *,
        root: bytes | None,
        store: KVStore,
        deliver: Callable[["Observation | Exception"], None],
    ) -> None:
        end = len(look.tokens)
        shown = _shown(look)
        self.sites = shown | _changed(look)
        self.end = _end(look)
        self.text = Text(
            tokens=list(look.tokens),
            limit=end,
            first_wanted=end - 1 if look.logits else end,
            root=None if look.edits else root,
            first_seen=look.start if shown else end - 1,
            shallow=self.end is not None and _layers_before(self.end) < store.geometry.layers,
        )
        self._look = look
        self._shown = shown
        self._store = store
        self._deliver = deliver
        self._rows: dict[Site, list[Tensor]] = defaultdict(list)
        self._weighing: dict[Site, Weighing] = {}
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._logits: Tensor | None = None
        self._error: Exception | None = None

    def see(self, positions: range, site: Site, rows: Tensor, weighing: Weighing | None) -> None:
        """Change the rows of these positions as is asked, then keep what is looked at.

        What goes wrong ends this job, not the pass that others are in.
        """
        try:
            self._change(positions, site, rows)
            seen = rows[max(0, self._look.start - positions.start) :]
            if site in self._shown and len(seen):
                self._rows[site].append(seen.to("cpu", copy=True))
                if weighing is not None:
                    self._weighing[site] = weighing
        except Exception as error:
            self._error = error

    def _change(self, positions: range, site: Site, rows: Tensor) -> None:
        edits = self._look.edits
        if site.kind == "heads":
            rows[:, list(edits.silenced.get(site.index, ()))] = 0
        elif site.kind == "residual":
            for span, vector in edits.added.get(site.index, ()):
                start, stop = (bound - positions.start for bound in (span.start, span.stop))
                rows[max(0, start) : max(0, stop)] += vector.to(rows)

    def accept(self, text: Text, position: int, logits: Row) -> bool:
        """Keep the logits after the last token."""
        self._logits = torch.from_numpy(logits.copy())
        return False

    def passed(self) -> bool:
        """After a pass: true, and keys and values are copied, if the text is computed."""
        if self._error is not None:
            raise self._error
        if self.text.remaining:
            return False
        table = self.text.table
        self._keys = {layer: self._store.keys(layer, table) for layer in self._look.keys}
        self._values = {layer: self._store.values(layer, table) for layer in self._look.values}
        return True

    def leave(self) -> None:
        """Before its blocks are let go: clear them of numbers that an edit may have made infinite.

        Where such are masked for others, their products with 0 would still not be 0.
        """
        if self._look.edits:
            self._store.clear(self.text.table)

    def finish(self) -> None:
        """Say that all is seen."""
        self._deliver(self)

    def fail(self, error: Exception) -> None:
        """Hand the error to whoever waits."""
        self._deliver(error)

    def seen(self) -> Seen:
        """What was seen, once the job is done, to be called once.

        It is put together, so not on the engine's thread, and its parts are let go of one by one.
        """
        tokens = len(self.text.tokens)
        rows = {site: torch.cat(self._rows.pop(site)) for site in list(self._rows)}
        return Seen(
            queries={
                site.index: (rows[site], weighing) for site, weighing in self._weighing.items()
            },
            residual={site.index: rows[site] for site in rows if site.kind == "residual"},
            normalised=rows.get(Site("normalised", 0)),
            keys={at: in_order(self._keys.pop(at), tokens) for at in self._look.keys},
            values={at: in_order(self._values.pop(at), tokens) for at in self._look.values},
            logits=self._logits,
            tokens_computed=tokens - self.text.reused,
            tokens_reused=self.text.reused,
        )


def _shown(look: Look) -> frozenset[Site]:
    sites = {Site("queries", layer) for layer in look.queries}
    sites |= {Site("residual", place) for place in look.residual}
    return frozenset(sites | ({Site("normalised", 0)} if look.normalised else set()))


def _changed(look: Look) -> frozenset[Site]:
    sites = {Site("heads", layer) for layer in look.edits.silenced}
    return frozenset(sites | {Site("residual", layer) for layer in look.edits.added})


def _end(look: Look) -> Site | None:
    """The site by which all there is to be seen was there; null for the end of the pass."""
    if look.logits or look.normalised:
        return None
    weighed = look.queries | look.keys | look.values  # queries are there once K and V are stored
    sites = {Site("queries", layer) for layer in weighed}
    return _deepest(sites | {Site("residual", place) for place in look.residual})


def _deepest(ends: Iterable[Site]) -> Site | None:
    return max(ends, key=lambda site: (site.index, _layers_before(site)), default=None)


def _layers_before(end: Site) -> int:
    """How many layers have stored K and V by then."""
    return end.index + (end.kind == "queries")


class Gallery:
    """The watch of a pass: gives each of the jobs that look on its own rows, null for no job.

    The pass ends where the last of them has seen all, if no other job is in it.
    """

    def __init__(self, slices: Sequence[Slice], jobs: Sequence[Observation | None]) -> None:
        ends = [job.end if job else None for job in jobs]
        self.until = _deepest(filter(None, ends)) if all(ends) else None
        self._views: list[tuple[Observation, Slice, int]] = []
        row = 0
        for piece, job in zip(slices, jobs, strict=True):
            if job is not None:
                self._views.append((job, piece, row))
            row += piece.count
        self.sites = frozenset[Site]().union(*(job.sites for job, _, _ in self._views))
        self._shown = Counter[Site]()

    def see(self, site: Site, rows: Tensor, weighing: Weighing | None) -> None:
        """See :class:`infra.engine.forward.Watch`."""
        begin = self._shown[site]
        self._shown[site] = end = begin + len(rows)
        for job, piece, first in self._views:
            start, stop = max(first, begin), min(first + piece.count, end)
            if site in job.sites and start < stop:
                position = piece.start + start - first
                positions = range(position, position + stop - start)
                job.see(positions, site, rows[start - begin : stop - begin], weighing)
