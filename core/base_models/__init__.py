"""Base models on this machine and on the hub: found, listed, fetched on the user's word."""
