"""One file a tab, each with `build(ctx) -> Tab`."""
