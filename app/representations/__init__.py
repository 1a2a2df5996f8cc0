"""An analysis as a client wants to see it, by ``Accept``."""

from app.representations.forms import JSON, NPY, SAFETENSORS, Wanted, represent, wanted

__all__ = ["JSON", "NPY", "SAFETENSORS", "Wanted", "represent", "wanted"]
