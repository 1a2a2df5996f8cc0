"""What is found, as people and other programs read it."""
