"""What is well and what is wrong on the machines at hand, each with its remedy, before a run finds out by itself."""
