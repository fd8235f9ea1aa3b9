"""Which mutants are worth their time: `python tests/mutants.py SESSION [SHARE]`.

After `cosmic-ray init`. The others are marked as skipped: those of annotations, overloads and stars,
which are no arithmetic, those of a module's constants, which are settings of speed and memory, and of
the many operators that could stand in one place all but the nearest. With a share, a sample.
"""

import ast
import functools
import random
import re
import sys
from pathlib import Path

NEAREST = re.compile(
    r"core/(NumberReplacer|AddNot|RemoveDecorator|ZeroIterationForLoop"
    r"|Replace(TrueWithFalse|FalseWithTrue|AndWithOr|OrWithAnd)"
    r"|ReplaceUnaryOperator_(USub_UAdd|Delete_Invert|Delete_Not)"
    r"|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|Pow_Mul"
    r"|BitAnd_BitOr|BitOr_BitAnd)"
    r"|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt"
    r"|Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt))"
)

Place = tuple[int, int]  # line and column
Span = tuple[Place, Place]


def start(node) -> Place:
    return node.lineno, node.col_offset


def end(node) -> Place:
    return node.end_lineno, node.end_col_offset


@functools.cache
def spans(path: Path) -> tuple[list[Span], list[Span]]:
    """Of what is left out, and of the places where binary operators stand."""
    tree = ast.parse(path.read_text())
    left_out, operators = [], []
    for node in ast.walk(tree):
        decorators = getattr(node, "decorator_list", [])
        if any(isinstance(d, ast.Name) and d.id == "overload" for d in decorators):
            left_out.append(((decorators[0].lineno, 0), end(node)))
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if node in tree.body and isinstance(node, ast.Assign):
            parts.append(node)
        left_out += [(start(part), end(part)) for part in parts if part is not None]
        if isinstance(node, ast.BinOp):
            operators.append((end(node.left), start(node.right)))
        elif isinstance(node, ast.AugAssign):
            operators.append((end(node.target), start(node.value)))
    return left_out, operators


def is_worth(path: Path, operator: str, place: Place) -> bool:
    in_left_out, in_operators = (any(a <= place < b for a, b in x) for x in spans(path))
    stands = in_operators or "BinaryOperator" not in operator
    return bool(NEAREST.fullmatch(operator)) and stands and not in_left_out


def main(path: str, share: float) -> None:
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    with use_db(path, WorkDB.Mode.open) as session:
        worth: dict[Path, list[str]] = {}
        rest = {item.job_id: item.mutations[0] for item in session.work_items}
        for job, m in rest.items():
            if is_worth(m.module_path, m.operator_name, m.start_pos):
                worth.setdefault(m.module_path, []).append(job)
        for jobs in worth.values():
            for job in random.Random(0).sample(jobs, round(share * len(jobs))):
                del rest[job]
        session.set_multiple_results(rest, WorkResult(WorkerOutcome.SKIPPED, "not chosen"))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
