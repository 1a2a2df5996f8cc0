"""The HTTP routes: thin, one module per noun."""
