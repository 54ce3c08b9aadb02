"""A policy's function as a program for C: its arithmetic, operator by operator, over numbers of all experts at once.

One definition of a rule is what torch, numpy and Triton run: C runs the same, read from the function's source.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache

OPERATORS = {
    ast.Add: 2, ast.Sub: 3, ast.Mult: 4, ast.Div: 5, ast.Lt: 6, ast.LtE: 7, ast.Gt: 8, ast.GtE: 9, ast.Eq: 10,
    ast.NotEq: 11, ast.USub: 12, ast.LShift: 13, ast.BitAnd: 14,
}  # fmt: skip
"""Codes of ``route_cpu.c``; 0 is a word, 1 a number."""
LONGEST, DEEPEST = 64, 8  # steps of a program, and numbers that wait for an operator


@cache
def program_of(function: Callable, words: tuple[str, ...], whole: bool) -> tuple[tuple[int, float], ...] | None:
    """The function's steps in postfix order, (code, word's place or number) each; None where C is not to run it.

    Args:
        function: of some of ``words``, one expression of arithmetic and comparisons.
        whole: whether its numbers are whole, as of an eviction policy.
    """
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        *others, last = tree.body
        if not isinstance(tree, ast.FunctionDef) or not isinstance(last, ast.Return):
            return None
        if any(not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)) for each in others):
            return None
        steps = tuple(_steps(last.value, words, whole))
    except (OSError, TypeError, ValueError, SyntaxError, AttributeError):  # no source, or what C does not know
        return None
    depth = deepest = 0
    for code, _ in steps:
        depth += 1 if code < 2 else 0 if code == OPERATORS[ast.USub] else -1
        deepest = max(deepest, depth)
    return steps if len(steps) <= LONGEST and deepest <= DEEPEST else None


def _steps(node: ast.expr, words: tuple[str, ...], whole: bool):
    if isinstance(node, ast.Name):
        yield 0, words.index(node.id)
    elif isinstance(node, ast.Constant) and type(node.value) in ((int,) if whole else (int, float)):
        yield 1, node.value
    elif isinstance(node, ast.BinOp):
        if whole and isinstance(node.op, ast.LShift) and isinstance(node.left, ast.Constant):
            yield 1, ast.literal_eval(node.left) << ast.literal_eval(node.right)  # 1 << 40
            return
        yield from _steps(node.left, words, whole)
        yield from _steps(node.right, words, whole)
        yield _code(node.op, whole), 0
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield from _steps(node.left, words, whole)
        yield from _steps(node.comparators[0], words, whole)
        yield _code(node.ops[0], whole), 0
    elif isinstance(node, ast.UnaryOp):
        yield from _steps(node.operand, words, whole)
        yield _code(node.op, whole), 0
    else:
        raise ValueError(ast.dump(node))


def _code(operator, whole: bool) -> int:
    code = OPERATORS.get(type(operator))
    if code is None or (code in (13, 14) and not whole) or (code == 5 and whole):
        raise ValueError(f"no {type(operator).__name__} here")
    return code
