"""Data, prompts and scoring of the evaluations, one file per benchmark."""
