"""Verifiers for tasks of reasoning-gym that can be scored without evaluating the response.

reasoning-gym's own scorers must not see a model's text: n_queens calls `eval` on it, countdown and
others sympy's `parse_expr`, which ran a shell command when we asked it to. Here are the tasks whose
scorer gives 1.0 for a comparison of texts (rewritten, and compared with the library in the tests)
and countdown, read through a whitelist. Only what the library scores 1.0 is right.

The response's answer is what its last <answer>...</answer> holds, as the library's prompts ask.
"""

from __future__ import annotations

import ast
import difflib
from collections import Counter
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from megafork.errors import UserError

_LONGEST_EXPRESSION = 200
_LONGEST_NUMBER = 100
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def task_verifier(task: str) -> Callable[[str, str, str], float]:
    """The verifier of reasoning-gym:TASK. Raises UserError for a task that has none here."""
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"reward.verifier='reasoning-gym:{task}': {hint}The tasks that can be scored without "
            f"evaluating a model's text are {', '.join(sorted(TASKS))}; for another, write a "
            "verifier and name it as MODULE:FUNCTION"
        )
    is_right = TASKS[task]

    def verify(prompt: str, response: str, answer: str) -> float:
        found = tagged_answer(response)
        return float(found is not None and is_right(found, answer.strip()))

    return verify


def tagged_answer(response: str) -> str | None:
    """Return the content of the last <answer>...</answer>, without white space around it."""
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, max(end, 0))
    return response[start + len("<answer>") : end].strip() if 0 <= start < end else None


def _same(found: str, answer: str) -> bool:
    return found == answer


def _same_letters(found: str, answer: str) -> bool:
    return found.lower() == answer.lower()


def _same_words(found: str, answer: str) -> bool:
    return found.split() == answer.split()


def _same_decimal(found: str, answer: str) -> bool:
    """Return whether two decimals are equal, with 1,000.00 the same as +1000."""
    if len(found) > _LONGEST_NUMBER or not found.isascii():
        return False
    try:
        return Decimal(found.replace(",", "")) == Decimal(answer.replace(",", ""))
    except InvalidOperation:
        return False


def _reaches_same(found: str, answer: str) -> bool:
    """An expression of the answer's numbers, each as often as there, and of its value."""
    try:
        (numbers, value), (wanted, target) = map(_expression, (found, answer))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return False
    return numbers == wanted and value == target


def _expression(text: str) -> tuple[Counter[int], Fraction]:
    """Its numbers and its value. Raises ValueError for all but + - * / and natural numbers."""
    if len(text) > _LONGEST_EXPRESSION or not text.isascii():
        raise ValueError("too long, or no expression")
    numbers: Counter[int] = Counter()

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int() as number) if type(number) is int:
                numbers[number] += 1
                return Fraction(number)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
                return _OPERATIONS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
        raise ValueError(f"{type(node).__name__} is not allowed")

    result = value(ast.parse(text, mode="eval").body)
    return numbers, result


_COMPARED = """
acre aiw arc_1d base_conversion basic_arithmetic bf binary_alternation caesar_cipher circuit_logic
count_bits count_primes course_schedule emoji_mystery gcd isomorphic_strings largest_island lcm
leg_counting letter_counting list_functions mahjong_puzzle maze modulo_grid number_filtering
number_sequence ransom_note rotate_matrix rotten_oranges simple_equations simple_geometry
string_manipulation string_splitting string_synthesis syllogism word_sequence_reversal
"""
TASKS: dict[str, Callable[[str, str], bool]] = {
    **dict.fromkeys(_COMPARED.split(), _same),
    "color_cube_rotation": _same_letters,
    "family_relationships": _same_letters,
    "path_star": _same_words,
    "chain_sum": _same_decimal,
    "products": _same_decimal,
    "countdown": _reaches_same,
}
"""Of each task: is this text, the response's answer, as right as that one?"""
