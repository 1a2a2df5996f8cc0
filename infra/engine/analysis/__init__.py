"""What is found inside a model's passes, worked out off the engine's thread."""
