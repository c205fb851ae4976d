"""Checkpoints of stages 1 and 3: whole tensors by name, the same files whatever the number of ranks, ZeRO stage or precision."""
