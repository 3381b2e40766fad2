"""Broken inputs to everything that reads: `make fuzz` tries many, the suite a few."""
