"""What all figures share: colours told apart by readers with any colour vision, and the PNG with its caption."""

from __future__ import annotations

import io

COLOURS = "cividis"  # map of magnitudes: readable without red-green vision, and in grey
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's


def png_of(figure, description: str, dpi: int = 130) -> bytes:
    """A matplotlib figure as PNG; ``description`` is its caption in the report page."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi, metadata={"Description": description, "Software": "RotateKV"})
    return content.getvalue()
