"""What methods take from a calibration text, measured: one file a kind of statistics."""
