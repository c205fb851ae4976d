"""Checkpoints of stage 2: every unit and its optimizer whole, whichever rank held it; of those that ZeRO divides, each replica's part."""
