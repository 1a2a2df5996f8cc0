"""Facts and rules of Cacher: events, states, decisions, the hash chain, replay.

Nothing in this package performs I/O, reads a clock, draws a random number or knows a tensor.
Time, identifiers, seeds and results of the model are passed in.
"""
