"""What is learned: inputs, forward, loss and metric."""
