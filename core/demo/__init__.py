"""`darkroom demo`: trains on the built-in world, draws the compare sheet, judges the pictures."""
