"""The cache of a patched model: what it holds and how it grows, is cut and read."""
