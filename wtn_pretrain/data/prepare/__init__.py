"""From raw text to trained tokenizers and token files."""
