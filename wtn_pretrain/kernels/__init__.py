"""Fused operations, one file each: a plain torch reference, what is faster where it can run, and which of them is live."""
