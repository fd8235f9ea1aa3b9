"""The report in a terminal, by `rich`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ._cases import shape_text
from ._machine import hardware
from ._peers import BASELINE
from ._report import Report, geometric_means, versions
from ._row import Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {"wrong": "red", "failed": "yellow"}


def print_report(console: "Console", report: Report) -> None:
    from rich.markup import escape

    machine = hardware()
    console.print(f"{machine['device']}: {machine['processor']}, {machine['cores']} cores")
    console.print(", ".join(f"{name} {version}" for name, version in versions().items()))
    groups: dict[tuple[str | None, ...], list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.machine, row.subject, row.dtype, row.pass_name), []).append(row)
    for rows in groups.values():
        console.print()
        console.print(_table(rows))
        for row in rows:
            if row.detail:
                text = f"{shape_text(row.shape)}, {row.peer}: {row.status}, {row.detail}"
                console.print(escape(text), style=_STYLES.get(row.status))
    console.print()
    for line in _closing_lines(report):
        console.print(line, markup=False)


def _table(rows: Sequence[Row]) -> "Table":
    """One pass of a subject in one dtype, with a section for each shape. 80 columns suffice."""
    from rich import box
    from rich.table import Table

    first = rows[0]
    title = f"{first.subject}, {first.dtype}, {first.pass_name}"
    if first.machine is not None:
        mesh = f" {first.mesh[0]}x{first.mesh[1]}, each device" if first.mesh else ""
        title = f"compiled for {first.machine}{mesh}: {title}"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        padding=0, show_edge=False)  # fmt: skip
    table.add_column("\nNxV" if len(first.shape) == 2 else "\nNxDxV", no_wrap=True)
    columns = _measured(first) if first.machine is None else _compiled(first)
    if all(row.peak_bytes is None for row in rows):
        columns.pop("peak\nMiB", None)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is None or before.shape != row.shape:
            if before is not None:
                table.add_section()
            table.add_row(shape_text(row.shape), style="dim")
        style = "bold" if row.peer == "jax_sce" else _STYLES.get(row.status)
        table.add_row(row.peer, *(cell(row) for cell in columns.values()), style=style)
    return table


Columns = dict[str, Callable[[Row], str]]


def _measured(first: Row) -> Columns:
    return {
        "ms": lambda r: _ms(r.seconds.median) if r.seconds else r.status,
        "quartiles": lambda r: f"{_ms(r.seconds.low)}-{_ms(r.seconds.high)}" if r.seconds else "",
        **_ratios(first),
        "comp.\ns": lambda r: _text("{:.2f}", r.compile_seconds),
        "temp.\nMiB": lambda r: _mebibytes(r.temporary_bytes),
        "peak\nMiB": lambda r: _mebibytes(r.peak_bytes),
        "error": lambda r: _text("{:.0e}", max(r.value_error or 0, r.gradient_error or 0) or None),
    }


def _ratios(first: Row) -> Columns:
    return {
        f"time /\n{BASELINE[first.subject]}": lambda r: _ratio(r.ratio),
        "time /\nfloor": lambda r: _ratio(r.floor_fraction and 1 / r.floor_fraction),
    }


def _compiled(first: Row) -> Columns:
    """The bound is the time that the machine's memory and matrix units need, and not measured."""

    def of(field: str, unit: float = 1) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            number = getattr(row.cost, field, None)
            return "" if number is None else _three_digits(number / unit)

        return cell

    is_head = len(first.shape) == 3
    columns = {
        "times\n6NDV" if is_head else "passes": of("products" if is_head else "passes"),
        "GB": of("bytes", 1e9),
        "temp.\nMiB": lambda r: _mebibytes(r.temporary_bytes),
        "kernels": lambda r: _text("{:,}", r.cost and r.cost.kernels),
        "sent\nGB": of("sent", 1e9),
        "in\nloops": of("sent_in_loop", 1e9),
        "bound\nms": lambda r: r.status if r.cost is None else of("seconds", 1e-3)(r),
        **_ratios(first),
    }
    if first.mesh is None:
        del columns["sent\nGB"], columns["in\nloops"]
    return columns


def _closing_lines(report: Report) -> list[str]:
    lines = []
    for fit in report.fits:
        cost = {"seconds": "time", "temporary_bytes": "temporary memory"}[fit.cost]
        lines.append(f"{fit.peer}: {cost} grows as {fit.size}^{fit.exponent:.2f}")
    if (seconds := report.import_seconds) is not None:
        quartiles = f"[{_ms(seconds.low)}, {_ms(seconds.high)}]"
        lines.append(f"import jax_sce, after jax: {_ms(seconds.median)} ms {quartiles}")
    for (machine, subject, dtype), mean in geometric_means(report.rows).items():
        time = "time" if machine is None else f"bound on {machine}"
        whose = f"{BASELINE[subject]}'s {time} (geometric mean)"
        lines.append(f"{subject} {dtype}: jax_sce takes {mean:.2f} of {whose}")
    lines += _about_floors(report.rows)
    for subject, packages in report.missing.items():
        if packages:
            lines.append(f"{subject}: not compared, because not installed: {', '.join(packages)}")
    return [*lines, f"{report.wall_seconds:.0f} s in all"]


def _about_floors(rows: Sequence[Row]) -> list[str]:
    """What the floors are, and why a time may be below one."""
    measured = [row for row in rows if row.machine is None]
    is_head = {len(row.shape) == 3 for row in measured}
    lines = []
    if False in is_head:
        lines.append("floor, losses on logits: a pass that only negates the logits")
    if True in is_head:
        lines.append("floor, linear head: its matrix products alone")
    if any((row.floor_fraction or 0) > 1 for row in measured):
        lines.append(
            "time / floor below 1: the pass writes less than the floor does, or its arrays stay in "
            "the cache"
        )
    if len(measured) < len(rows):
        lines.append("floor, compiled: the least bytes and products, at the data sheet's rates")
    return lines


def _ms(seconds: float) -> str:
    return _three_digits(1e3 * seconds)


def _mebibytes(size: int | None) -> str:
    return "" if size is None else _three_digits(size / 2**20)


def _three_digits(number: float) -> str:
    """Three digits, or all digits before the point."""
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}" if abs(number) >= 0.001 else f"{number:.0g}"


def _ratio(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}" if number < 100 else f"{number:,.0f}"


def _text(form: str, number: float | None) -> str:
    return "" if number is None else form.format(number)
