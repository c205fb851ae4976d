"""In and out of the ecosystem: networks from elsewhere as teachers, and the thin network in the formats that people deploy."""
