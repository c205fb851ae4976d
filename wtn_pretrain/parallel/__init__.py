"""Ranks: how a process finds its place, and what has to be summed over them."""
