"""BERT: shape, network and its adapter to Hugging Face."""
