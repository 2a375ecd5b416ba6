"""What tests share lies in tests/support: no test file imports another, nor a conftest."""

import ast

import pytest

from tests.support.paths import ROOT

TESTS = ROOT / "tests"


def modules_imported(text: str) -> set[str]:
    """The modules that Python text names in its import statements, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_no_test_file_is_imported(folder):
    private = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for pattern in ("test_*.py", "conftest.py")
        for path in TESTS.rglob(pattern)
    }
    assert len(private) > 100
    found = {path: modules_imported(path.read_text()) & private for path in (ROOT / folder).rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): names for path, names in found.items() if names}
