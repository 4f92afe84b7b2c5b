"""The arithmetic. The files here are its specification in torch; ``cpu`` and ``triton`` compute the same, faster."""
