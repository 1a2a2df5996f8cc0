"""Models: their names, their files, their tokenizers, and the ones that ship."""
