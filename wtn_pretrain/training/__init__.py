"""Stages 1 and 3: one training loop over DeepSpeed, and what it needs."""
