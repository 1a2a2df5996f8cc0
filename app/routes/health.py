"""``/health``, ``/ready`` and ``/metrics``."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Final

from litestar import MediaType, Router, get

from app.schemas import Health
from app.service import Service
from domain.models import CacheCounters

_VERSION = version("cacher-api3")
_Counted = tuple[str, Callable[[CacheCounters], int]]
_OF_EACH_MODEL: Final[dict[str, _Counted]] = {
    "cacher_kv_block_bytes": ("Bytes of one block of KV cache.", lambda c: c.block_bytes),
    "cacher_kv_blocks_capacity": ("Blocks there are.", lambda c: c.blocks_capacity),
    "cacher_kv_blocks_held": ("Blocks that running texts hold.", lambda c: c.blocks_held),
    "cacher_kv_blocks_cached": (
        "Blocks that can be found by content, held or not.",
        lambda c: c.blocks_cached,
    ),
    "cacher_kv_capacity_bytes": (
        "Bytes of KV cache there are.",
        lambda c: c.blocks_capacity * c.block_bytes,
    ),
    "cacher_kv_held_bytes": (
        "Bytes of KV cache that running texts hold.",
        lambda c: c.blocks_held * c.block_bytes,
    ),
    "cacher_kv_cached_bytes": (
        "Bytes of KV cache that can be found by content, held or not.",
        lambda c: c.blocks_cached * c.block_bytes,
    ),
    "cacher_kv_free_bytes": (
        "Bytes of KV cache that are neither held nor can be found.",
        lambda c: c.blocks_free * c.block_bytes,
    ),
    "cacher_kv_shared_bytes": (
        "Bytes more that running texts would hold if they shared no block.",
        lambda c: c.blocks_shared * c.block_bytes,
    ),
    "cacher_kv_host_capacity_bytes": (
        "Bytes of host memory for blocks that had to leave the device.",
        lambda c: c.host_blocks_capacity * c.block_bytes,
    ),
    "cacher_kv_host_cached_bytes": (
        "Bytes of host memory that hold such blocks.",
        lambda c: c.host_blocks_cached * c.block_bytes,
    ),
    "cacher_kv_hits_total": ("Blocks found instead of computed.", lambda c: c.hits),
    "cacher_kv_misses_total": ("Blocks looked for and computed.", lambda c: c.misses),
    "cacher_kv_evictions_total": ("Blocks that had to leave the device.", lambda c: c.evictions),
    "cacher_kv_restores_total": ("Blocks found that came from the host.", lambda c: c.restores),
    "cacher_kv_sequences": ("Texts that run or wait for a place.", lambda c: c.sequences),
    "cacher_sequences_waiting": (
        "Texts that wait for a place in the batch.",
        lambda c: c.sequences_waiting,
    ),
}


@get("/health")
async def health() -> Health:
    """The server is up: answered at once, whatever the models are doing."""
    return Health(status="ok", version=_VERSION)


@get("/ready")
async def ready(service: Service) -> Health:
    """The log can be read. Models load on first use and are not waited for."""
    await service.log.head()
    return Health(status="ok", version=_VERSION)


@get("/metrics", media_type=MediaType.TEXT)
async def metrics(service: Service) -> str:
    """Counters for Prometheus (text exposition format 0.0.4)."""
    lines = _metric("cacher_requests_in_line", "Requests that work or wait.")
    lines.append(f"cacher_requests_in_line {service.turns.held + service.questions.held}")
    counters = service.models.counters()
    for name, (meaning, value) in _OF_EACH_MODEL.items():
        lines += _metric(name, meaning)
        lines += [
            f'{name}{{model="{_escaped(model)}"}} {value(values)}'
            for model, values in counters.items()
        ]
    return "\n".join(lines) + "\n"


def _metric(name: str, meaning: str) -> list[str]:
    """The lines that say what a metric is."""
    kind = "counter" if name.endswith("_total") else "gauge"
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


router = Router("/", tags=["health"], route_handlers=[health, ready, metrics])
