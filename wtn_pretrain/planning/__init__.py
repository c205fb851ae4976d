"""Which spans and replicas are fastest, how fast, and in how much memory: answered without running."""
