"""Models by name, their weights and tokenizers."""
