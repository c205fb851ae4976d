"""What checkpoints of every stage have in common: how their files are vouched for, which are kept, and how ranks make one together."""
