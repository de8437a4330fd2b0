"""Captioners: each turns pictures into text."""
