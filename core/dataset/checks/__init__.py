"""Checks of a folder of images before a training: findings, and what mends them."""
