"""``/health``, ``/ready`` and ``/metrics``."""

from importlib.metadata import version

from litestar import MediaType, Router, get

from app.schemas import Health
from app.service import Service

_VERSION = version("cacher-api3")


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
    lines = [
        "# TYPE cacher_requests_in_line gauge",
        f"cacher_requests_in_line {service.turns.held}",
    ]
    counters = service.models.counters()
    for name, kind in (
        ("blocks_capacity", "gauge"),
        ("blocks_held", "gauge"),
        ("blocks_cached", "gauge"),
        ("block_bytes", "gauge"),
        ("hits", "counter"),
        ("misses", "counter"),
        ("evictions", "counter"),
        ("sequences", "gauge"),
    ):
        suffix = "_total" if kind == "counter" else ""
        lines.append(f"# TYPE cacher_kv_{name}{suffix} {kind}")
        lines += [
            f'cacher_kv_{name}{suffix}{{model="{model}"}} {getattr(values, name)}'
            for model, values in counters.items()
        ]
    return "\n".join(lines) + "\n"


router = Router("/", tags=["health"], route_handlers=[health, ready, metrics])
