"""The thin network in the formats that people deploy, each held against the original before it counts as written."""
