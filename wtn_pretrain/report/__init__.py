"""What a person sees at the end of a run: the figures, the table and the page."""
