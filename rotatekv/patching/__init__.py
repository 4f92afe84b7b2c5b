"""What a model is given to use the cache, and how all of it is taken back."""
