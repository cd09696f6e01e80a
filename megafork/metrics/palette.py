"""The page's colours, for light and for dark: text on each of them has a contrast of 4.5 to 1."""

from __future__ import annotations

SHADE_EDGES = (0.05, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5)
"""Nats: a token at or above the i-th has shade i + 1, below all of them none. Fixed, so that steps
and runs can be compared."""
THEMES = {
    "light": {
        "page": "#ffffff",
        "panel": "#f5f6f8",
        "line": "#c9ced6",
        "ink": "#1a1c1f",
        "quiet": "#565c66",
        "good": "#146c2e",
        "bad": "#a3201d",
    },
    "dark": {
        "page": "#14171b",
        "panel": "#1d2127",
        "line": "#3a414b",
        "ink": "#e9ebee",
        "quiet": "#a7aeb9",
        "good": "#6fd08c",
        "bad": "#ff9a92",
    },
}
SHADES = {
    "light": ("#fff6d6", "#ffe9a8", "#ffd97a", "#ffc453", "#fdab3c", "#f58f2e", "#ea7424"),
    "dark": ("#332a14", "#463614", "#594214", "#6b4a14", "#7d5013", "#8d5413", "#9c5712"),
}
CURVES = ("#2f7bd0", "#c8641c", "#2b9a62", "#a45bb0", "#8a7a1f", "#7d8590", "#c24a72", "#2a93a3")
"""Of lines and areas, on either theme: 3 to 1 against both pages."""


def shade_of(entropy: float) -> int:
    """0 to len(SHADE_EDGES)."""
    return sum(entropy >= edge for edge in SHADE_EDGES)
