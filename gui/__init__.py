"""The window. Still empty: the command line does everything so far."""
