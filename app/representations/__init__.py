"""An analysis as a client wants to see it, by ``Accept``."""

from app.representations.forms import JSON, NPY, SAFETENSORS, Wanted, represent, wanted
from app.representations.negotiation import NotAcceptable

__all__ = ["JSON", "NPY", "SAFETENSORS", "NotAcceptable", "Wanted", "represent", "wanted"]
