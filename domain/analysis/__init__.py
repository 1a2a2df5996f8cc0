"""Looking inside a state: what can be asked, and what an answer is."""
