"""The ports of :mod:`domain` made real: the event log, the engine, the models."""
