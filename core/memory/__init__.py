"""What a run will hold in memory before it starts, what it gives up so that it fits, and the
watch while it goes.
"""
