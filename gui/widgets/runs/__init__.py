"""Runs as the page shows them: losses, previews, two runs compared, all runs listed."""
