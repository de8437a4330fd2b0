"""Optimizers by name, learning-rate schedules, the moving average of weights."""
