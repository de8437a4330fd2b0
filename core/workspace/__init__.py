"""What the user keeps: presets, projects, settings."""
