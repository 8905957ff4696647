"""Measuring drafters: takes prompts and drafters as arguments, knows no data set and no callback."""
