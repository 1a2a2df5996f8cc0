"""What the engine is asked to do with texts: each kind of work is one that its passes serve."""
