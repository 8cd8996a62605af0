"""Prove the claims that a lesson makes only above size tiny, and write down what was measured.

A lesson runs at tiny in every test, and there some of its claims cannot hold: `if run_size() != "tiny": ...`.
This command runs lessons at size sample, evaluates every such claim where it stands, and writes
nbs/results/claims-LESSON.json with date, command, the values on both sides of each comparison, and the
lesson's headline with its interval. `make test` reads these files (tests/test_claims.py).

    python tests/measure_claims.py 16_gradcam 17_shift
"""
from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUARD = re.compile(r"""\brun_size\(\) *(!=|==) *["']tiny["']""")
NOTE = '''
def _note_claim(claim, held, operands):
    import numpy as np
    def plain(v):
        try: return np.asarray(v, float).round(4).tolist()
        except (TypeError, ValueError): return str(v)[:80]
    _claims.append(dict(claim=claim, held=bool(held), values={k: plain(v) for k, v in operands.items()}))
_claims = []
'''


def above_tiny(node: ast.AST) -> bool:
    "Whether these statements run, or this claim is made, only above size tiny."
    if isinstance(node, ast.If): return bool(GUARD.search(ast.unparse(node.test)))
    claim = node.test if isinstance(node, ast.Assert) else None
    return (
        isinstance(claim, ast.BoolOp)
        and isinstance(claim.op, ast.Or)
        and bool(GUARD.search(ast.unparse(claim.values[0])))
    )


class Noting(ast.NodeTransformer):
    "Every claim that is made only above size tiny is noted, and no longer stops the lesson."
    def __init__(self): self.claims = []

    def note(self, claim: ast.expr) -> ast.stmt:
        self.claims.append(ast.unparse(claim))
        sides = {ast.unparse(side) for node in ast.walk(claim) if isinstance(node, ast.Compare)
                 for side in (node.left, *node.comparators) if not isinstance(side, ast.Constant)}
        operands = "{" + ", ".join(f"{name!r}: {name}" for name in sorted(sides)) + "}"
        return ast.parse(f"_note_claim({ast.unparse(claim)!r}, {ast.unparse(claim)}, {operands})").body[0]

    def visit_If(self, node):
        if above_tiny(node):
            node.body = [self.note(n.test) if isinstance(n, ast.Assert) else n for n in node.body]
        return node

    def visit_Assert(self, node):
        return self.note(ast.BoolOp(ast.Or(), node.test.values[1:]) if len(node.test.values) > 2
                         else node.test.values[1]) if above_tiny(node) else node


def guarded(source: str) -> tuple[list[str], str]:
    "The claims of a cell that are made only above size tiny, and the cell with these claims noted."
    if not GUARD.search(source): return [], source
    noting = Noting()
    tree = noting.visit(ast.parse(source))
    return noting.claims, ast.unparse(ast.fix_missing_locations(tree)) if noting.claims else source


def lesson(name: str) -> Path:
    "The notebook of that name, wherever it lies."
    found = sorted(p for p in (ROOT / "nbs").rglob(f"{name}*.ipynb") if not p.name.startswith((".", "_")))
    if len(found) != 1:
        sys.exit(f"{len(found)} notebooks are called {name}: {', '.join(p.name for p in found)}")
    return found[0]


def measure(path: Path, size: str, out: Path) -> int:
    "Run a lesson with its claims noted; how many did not hold."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    claims = 0
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        found, cell.source = guarded(cell.source)
        claims += len(found)
    if not claims:
        print(f"{path.stem}: no claim is guarded")
        return 0
    nb.cells = [nbformat.v4.new_code_cell(NOTE), *nb.cells,
                nbformat.v4.new_code_cell("import json; print('claims:' + json.dumps(_claims))")]
    os.environ["CXR_COURSE_SIZE"], start = size, time.time()
    NotebookClient(nb, timeout=7200, kernel_name="python3",
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    text = "".join(o.get("text", "") for c in nb.cells if c.cell_type == "code" for o in c.outputs
                   if o.output_type == "stream" and o.name == "stdout")
    found = json.loads(re.search(r"^claims:(.*)$", text, re.M)[1])
    assert len(found) == claims or size == "tiny"
    result = dict(lesson=path.stem, date=date.today().isoformat(), size=size,
                  command=f"python tests/measure_claims.py {path.stem}", seconds=round(time.time() - start),
                  headline=re.findall(r"^headline: (.*)$", text, re.M), claims=found)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"claims-{path.stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    for c in found: print("holds " if c["held"] else "FAILS ", c["claim"], c["values"])
    return sum(not c["held"] for c in found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="+", help="names of notebooks, or how they begin")
    parser.add_argument("--size", default="sample", choices=("tiny", "sample", "full"))
    parser.add_argument("--out", type=Path, default=ROOT / "nbs" / "results")
    options = parser.parse_args()
    sys.exit(sum(measure(lesson(name), options.size, options.out) for name in options.lessons) > 0)
