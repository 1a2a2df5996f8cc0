"""Looking inside states: each kind of question in a module of its own."""
