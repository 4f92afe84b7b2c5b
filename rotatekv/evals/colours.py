"""The colours of all figures, told apart by readers with any colour vision."""

COLOURS = "cividis"  # map of magnitudes: readable without red-green vision, and in grey
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
