"""Correct programs with one small mistake each (mutants), which a problem's tests must reject."""

import ast
import copy
import random
from collections.abc import Iterator

SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.FloorDiv,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def _mistakes(function: ast.FunctionDef) -> Iterator[tuple[str, ast.AST, str, object]]:
    """Yield possible mistakes as (kind, node, field, new value of the field)."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    for node in ast.walk(function):
        if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPS:
            yield "operator", node, "op", SWAPS[type(node.op)]()
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield "comparison", node, "ops", [SWAPS[type(node.ops[0])](), *node.ops[1:]]
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield "off by one", node, "value", node.value + 1
        if isinstance(node, ast.Constant) and type(node.value) is bool:
            yield "constant", node, "value", not node.value
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield "condition", node, "test", ast.UnaryOp(ast.Not(), node.test)
        if isinstance(node, ast.Return) and ast.dump(node.value or ast.Constant(None)) != ast.dump(ast.Constant(None)):
            yield "constant returned", node, "value", ast.Constant(None)
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            for i, statement in enumerate(block if isinstance(block, list) else ()):
                if statement is not docstring and not isinstance(
                    statement, (ast.Return, ast.Pass, ast.Import, ast.FunctionDef)
                ):
                    yield "statement dropped", node, field, [*block[:i], ast.Pass(), *block[i + 1 :]]


def mutant(program: str, name: str) -> tuple[str, str]:
    """Return the program with one mistake in its function `name`, always the same, and what kind of mistake it is."""
    tree = copy.deepcopy(ast.parse(program))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    kind, node, field, value = random.Random(program).choice(list(_mistakes(function)))
    setattr(node, field, value)
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n", kind
