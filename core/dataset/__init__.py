"""A folder of images as training reads it: files, captions, crops, buckets, cached latents,
and which samples each update sees.
"""
