"""The use cases, one function each: read, fold, decide, let the model work, append."""
