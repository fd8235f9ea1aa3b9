"""The reports in a terminal, by `rich`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._conformance import FAIL, PASS, Report, Result

if TYPE_CHECKING:
    from rich.console import Console


def print_report(console: "Console", report: Report) -> None:
    """Of one loss: each promise, and how each broken one is reproduced."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    title = f"{report.name}, {report.kind}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("promise", "", "error", "bound", "what it says"):
        table.add_column(name, justify="right" if name in ("error", "bound") else "left")
    for result in report.results:
        table.add_row(
            result.promise, _mark(result), _number(result.error), _number(result.bound),
            escape(result.detail if result.status not in (PASS, FAIL) else result.says),
            style={PASS: None, FAIL: "red"}.get(result.status, "dim"),
        )  # fmt: skip
    console.print(table)
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


def markdown(reports: Sequence[Report]) -> str:
    """A table of the promises that someone breaks, for a README."""
    lines = ["| |" + "".join(f" {report.name} |" for report in reports)]
    lines.append("|---|" + ":-:|" * len(reports))
    kept = []
    for rows in zip(*(report.results for report in reports), strict=True):
        if all(row.status != FAIL for row in rows):
            kept.append(rows[0].promise)
        else:
            lines.append(f"| {rows[0].promise} |" + "".join(f" {_mark(row)} |" for row in rows))
    if kept:
        lines += ["", f"Kept by all that they apply to: {', '.join(kept)}."]
    return "\n".join(lines)


def _mark(result: Result) -> str:
    if result.status == FAIL:
        return "documented" if result.documented else "no"
    return "yes" if result.status == PASS else "–"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"
