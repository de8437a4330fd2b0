"""Parts of pages: pure functions from what is known to HTML, everything escaped."""
