"""Which layout a stage of training needs, how fast it is, in how much memory and for how much money: answered without running it."""
