"""From a row of logits to a token, and what is recorded of it."""
