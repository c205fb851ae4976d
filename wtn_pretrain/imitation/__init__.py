"""Stage 2: the thin network imitates the wide one, block by block."""
