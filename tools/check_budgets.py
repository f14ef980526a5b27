"""Checks the budgets that no linter checks: lines of a function and of a file. Exceptions stand here with a reason."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500
FOLDERS = ("src", "tools", "benchmarks", "examples")
EXCEPTIONS: dict[str, str] = {}


def violations(path: Path) -> Iterator[str]:
    """Each function and file that is over its budget, as one line."""
    text = path.read_text(encoding="utf-8")
    num_lines = text.count("\n")
    if num_lines > MAX_FILE_LINES:
        yield f"{path}: {num_lines} lines, the budget is {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            size = node.end_lineno - node.lineno + 1
            if size > MAX_FUNCTION_LINES and f"{path}:{node.name}" not in EXCEPTIONS:
                yield f"{path}:{node.lineno}: {node.name} has {size} lines, the budget is {MAX_FUNCTION_LINES}"


def main() -> int:
    """Prints all violations; 1 if there is one."""
    files = [path for folder in FOLDERS for path in sorted(Path(folder).rglob("*.py"))]
    found = [line for path in files for line in violations(path)]
    print("\n".join(found) or f"budgets kept in {len(files)} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
