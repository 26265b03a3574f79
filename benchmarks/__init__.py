"""Rung beside its peers: the same work, in alternation, on one machine. Start it with `make bench`."""
