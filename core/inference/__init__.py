"""Pictures from a base and LoRAs: drawing, compare grids, settings inside PNG files."""
