"""Captions for pictures. Still empty: captions come from your own files so far."""
