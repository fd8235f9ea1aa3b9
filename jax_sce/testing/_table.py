"""The reports in a terminal, by `rich`, and as Markdown. 80 columns suffice."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._conformance import FAIL, NOT_APPLICABLE, PASS, Report, Result

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_report(console: "Console", report: Report) -> None:
    """The report of one loss: each promise, and how each broken one is reproduced."""
    from rich.markup import escape

    table = _new_table(f"{report.name}, kind {report.kind}")
    for name in ("promise", "kept", "error", "allowed", "the promise says"):
        numbers = name in ("error", "allowed")
        table.add_column(name, justify="right" if numbers else "left", no_wrap=numbers)
    idle: dict[str, list[str]] = {}  # promises that do not apply, by the reason
    for result in report.results:
        if result.status == NOT_APPLICABLE:
            idle.setdefault(result.detail, []).append(result.promise)
            continue
        style = "red" if result.status == FAIL else None
        numbers_of = _number(result.error), _number(result.bound)
        table.add_row(result.promise, _mark(result), *numbers_of, escape(result.says), style=style)
    if table.row_count:
        console.print(table)
    for reason, promises in idle.items():
        line = f"Not applicable, {reason}: {', '.join(promises)}"
        console.print(escape(line), style="dim")
    for result in report.broken:
        documented = f" ({result.documented})" if result.documented else ""
        console.print(f"\n[bold red]{result.promise}[/]: {escape(result.broken + documented)}")
        console.print(escape(result.detail))
        if result.reproduce:
            console.print(escape(result.reproduce), style="dim", soft_wrap=True)
    counts = {status: sum(r.status == status for r in report.results) for status in (PASS, FAIL)}
    rest = len(report.results) - sum(counts.values())
    console.print(
        f"\n{report.name}: promises kept {counts[PASS]}, broken {counts[FAIL]}, not applicable {rest}"
    )


def print_side_by_side(console: "Console", reports: Sequence[Report]) -> None:
    """The promises that at least one loss breaks, with a numbered column for each loss."""
    table = _new_table("Which loss keeps which promise")
    table.add_column("promise")
    for number in range(1, 1 + len(reports)):
        table.add_column(str(number), justify="center", no_wrap=True)
    broken, kept = _by_promise(reports)
    for rows in broken:
        table.add_row(rows[0].promise, *(_mark(row) for row in rows))
    console.print(table)
    names = ", ".join(f"{i} {report.name}" for i, report in enumerate(reports, 1))
    console.print(f"Columns: {names}.", markup=False)
    console.print("–: not applicable. (no): no, and the loss's documentation says so.")
    console.print(_closing_line(kept))


def markdown(reports: Sequence[Report]) -> str:
    """The same table, for a page."""
    lines = ["| |" + "".join(f" {report.name} |" for report in reports)]
    lines.append("|---|" + ":-:|" * len(reports))
    broken, kept = _by_promise(reports)
    for rows in broken:
        lines.append(
            f"| {rows[0].promise} |" + "".join(f" {_mark(row, 'documented')} |" for row in rows)
        )
    return "\n".join([*lines, "", _closing_line(kept)])


def _new_table(title: str) -> "Table":
    from rich import box
    from rich.table import Table

    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip


def _by_promise(reports: Sequence[Report]) -> tuple[list[tuple[Result, ...]], list[str]]:
    """The results of each promise that some loss breaks, and the names of the other promises."""
    by_promise = list(zip(*(report.results for report in reports), strict=True))
    broken = [rows for rows in by_promise if any(row.status == FAIL for row in rows)]
    return broken, [rows[0].promise for rows in by_promise if rows not in broken]


def _closing_line(kept: Sequence[str]) -> str:
    return f"Kept wherever they apply: {', '.join(kept)}." if kept else "No promise is kept by all."


def _mark(result: Result, documented: str = "(no)") -> str:
    if result.status == FAIL:
        return documented if result.documented else "no"
    return "yes" if result.status == PASS else "–"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"
