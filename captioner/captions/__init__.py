"""Caption files: stored, searched, edited in bulk by rules, undone."""
