"""The engine: transformers models on one thread, with the same bits however work is cut up."""
