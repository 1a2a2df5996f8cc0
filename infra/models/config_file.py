"""A model's ``config.json``: what is known of it before it is loaded."""

import json
from pathlib import Path
from typing import Any

from infra.models.catalogue import Source


def read_config(source: Source) -> dict[str, Any] | None:
    """The model's ``config.json`` where that needs no download and there is one."""
    if source.kind == "hub":
        return None
    try:
        return read_json(Path(source.location) / "config.json")
    except (OSError, ValueError):
        return None


def is_classifier(config: dict[str, Any]) -> bool:
    """Whether a config is that of a sequence classifier."""
    names: list[str] = config.get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in names)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError, ValueError: there is none.
    """
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not an object")
    return content
