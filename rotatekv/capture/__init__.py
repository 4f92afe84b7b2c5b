"""Tensors of one text, as figures show them."""
