"""Servers for tests, each a process of its own on the loopback."""
