"""A run as a process: events, journal, requests to it, the manager that starts and watches it."""
