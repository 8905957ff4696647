"""Measuring drafters: takes prompts and drafters, knows no data set and no callback."""
