"""Every module, and every public class, function and method of the package, says what it is."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "megatron_dwm"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_version.py")


def public(node, prefix=""):
    """Yields the definitions that a user can reach, with their names."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield f"{prefix}{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}{child.name}.")


def is_more_of_the_same(node):
    """Whether the docstring is elsewhere: of an override, an overload, the setter of a property."""
    names = [ast.unparse(d) for d in node.decorator_list]
    return any(n in ("override", "overload") or n.endswith(".setter") for n in names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "the module"
    missing = [
        name
        for name, node in public(tree)
        if not ast.get_docstring(node) and not is_more_of_the_same(node)
    ]
    assert not missing
