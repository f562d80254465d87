"""Layers with an update that trains, and the arithmetic that serving shares with them. Knows no files."""
