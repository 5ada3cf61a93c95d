"""Hugging Face directories in and out.

In reading order:

    files    what may be read of a model directory, and how
    weights  load_model and save_model: one table of names
"""
