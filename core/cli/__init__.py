"""The command line: one module for each group of `darkroom` commands, and how a run is shown
in a terminal.
"""
