"""Signs and commands of mathematics, and which of them mean the same."""

from __future__ import annotations

import re

CHARACTERS = {
    **dict.fromkeys("\u2212\u2012\u2013\u2014\u2010\u2011", "-"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u3000\t\r\n", " "),
    "×": "\\times ",
    "·": "\\cdot ",
    "⋅": "\\cdot ",
    "∙": "\\cdot ",
    "÷": "\\div ",
    "∕": "/",
    "±": "\\pm ",
    "∓": "\\mp ",
    "∞": "\\infty ",
    "√": "\\sqrt ",
    "∛": "\\sqrt[3]",
    "π": "\\pi ",
    "≤": "\\le ",
    "⩽": "\\le ",
    "≥": "\\ge ",
    "⩾": "\\ge ",
    "≠": "\\ne ",
    "∈": "\\in ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∖": "\\setminus ",
    "∅": "\\emptyset ",
    "ø": "\\emptyset ",
    "ℝ": "\\mathbb{R}",
    "°": "\\degree ",
    "º": "\\degree ",
    "˚": "\\degree ",
    "′": "'",
    "’": "'",
    "…": "\\ldots ",
    "⋯": "\\ldots ",
    "£": "\\pounds ",
    "€": "\\euro ",
    "⟨": "\\langle ",
    "⟩": "\\rangle ",
    "⌊": "\\lfloor ",
    "⌋": "\\rfloor ",
    "⌈": "\\lceil ",
    "⌉": "\\rceil ",
    "∧": "\\land ",
    "∨": "\\lor ",
    "∣": "|",
} | {
    chr(code): f"\\{name} "
    for name, code in {
        "alpha": 0x3B1,
        "beta": 0x3B2,
        "gamma": 0x3B3,
        "delta": 0x3B4,
        "theta": 0x3B8,
        "lambda": 0x3BB,
        "mu": 0x3BC,
        "sigma": 0x3C3,
        "phi": 0x3C6,
        "omega": 0x3C9,
    }.items()
}
RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")

SYNONYMS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "sfrac", "nicefrac"), "frac"),
    **dict.fromkeys(("leq", "leqslant", "leqq"), "le"),
    **dict.fromkeys(("geq", "geqslant", "geqq"), "ge"),
    "lt": "<",
    "gt": ">",
    "neq": "ne",
    "dbinom": "binom",
    "tbinom": "binom",
    **dict.fromkeys(("varnothing", "O"), "emptyset"),
    "degrees": "degree",
    "textdegree": "degree",
    "infin": "infty",
    "bigcup": "cup",
    "bigcap": "cap",
    "smallsetminus": "setminus",
    "backslash": "setminus",
    **dict.fromkeys(("dots", "cdots", "dotsc", "dotsb"), "ldots"),
    "ast": "cdot",
    **dict.fromkeys(("lvert", "rvert", "vert"), "|"),
    "mid": "mid",
    "lbrace": "\\{",
    "rbrace": "\\}",
    "lbrack": "[",
    "rbrack": "]",
    "lparen": "(",
    "rparen": ")",
    "langle": "(",
    "rangle": ")",
    "wedge": "land",
    "vee": "lor",
    "colon": ":",
    "R": "reals",
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
    "tg": "tan",
    "varphi": "phi",
    "varepsilon": "epsilon",
    "cr": "row",
}
_SPACES = """
quad qquad thinspace medspace thickspace negthinspace enspace displaystyle textstyle scriptstyle
limits nolimits left right middle bigl bigr Bigl Bigr biggl biggr Biggl Biggr big Big bigg Bigg
mathstrut strut hfill newline nonumber small large Large bf rm it
"""
SPACES = frozenset(_SPACES.split())
"""Commands without a meaning"""
NULL_DELIMITERS = ("left", "right", "middle")
_TEXTS = """
text textbf textit textrm textsf texttt textnormal mbox hbox mathrm mathbf mathit mathsf mathtt
mathnormal operatorname bm boldsymbol emph underline ensuremath mathord
"""
TEXTS = frozenset(_TEXTS.split())
_WITH_ARGUMENT = """
hspace vspace phantom hphantom vphantom label tag color
"""
WITH_ARGUMENT = frozenset(_WITH_ARGUMENT.split())
MATRICES = {
    **dict.fromkeys(("matrix", "pmatrix", "bmatrix", "smallmatrix", "array", "psmallmatrix"), ""),
    "vmatrix": "determinant",
    "cases": "cases",
    "aligned": "cases",
    "align": "cases",
    "gathered": "cases",
}
CLOSERS = {"{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
OPENERS = {*CLOSERS, "(", "["}

PLAIN_NAMES = {
    "pi": "\\pi",
    "sqrt": "\\sqrt",
    "infinity": "\\infty",
    "inf": "\\infty",
    "infty": "\\infty",
    **{
        name: f"\\{name}"
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "arcsin", "arccos")
    },
    "arctan": "\\arctan",
}
"""Written without a backslash"""
