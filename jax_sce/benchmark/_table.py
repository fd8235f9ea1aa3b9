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
        console.print(line)


def _table(rows: Sequence[Row]) -> "Table":
    """Of one pass of a subject in one dtype: a section for each shape."""
    from rich import box
    from rich.table import Table

    first = rows[0]
    title = f"{first.subject}, {first.dtype}, {first.pass_name}"
    if first.machine is not None:
        mesh = f" {first.mesh[0]}x{first.mesh[1]}, each device" if first.mesh else ""
        title = f"compiled for {first.machine}{mesh}: {title}"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False)  # fmt: skip
    sizes = "NxV" if len(first.shape) == 2 else "NxDxV"
    table.add_column(sizes, no_wrap=True)
    table.add_column("peer", no_wrap=True)
    columns = _measured(first) if first.machine is None else _compiled(first)
    if all(row.peak_bytes is None for row in rows):
        columns.pop("peak MiB", None)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        is_new = before is None or before.shape != row.shape
        if is_new and before is not None:
            table.add_section()
        style = "bold" if row.peer == "jax_sce" else _STYLES.get(row.status)
        cells = [cell(row) for cell in columns.values()]
        table.add_row(shape_text(row.shape) if is_new else "", row.peer, *cells, style=style)
    return table


Columns = dict[str, Callable[[Row], str]]


def _measured(first: Row) -> Columns:
    return {
        "ms": lambda r: _ms(r.seconds.median) if r.seconds else r.status,
        "quartiles": lambda r: f"{_ms(r.seconds.low)}-{_ms(r.seconds.high)}" if r.seconds else "",
        f"/ {BASELINE[first.subject]}": lambda r: _text("{:.2f}", r.ratio),
        "floor": lambda r: _text("{:.0%}", r.floor_fraction),
        "compile s": lambda r: _text("{:.2f}", r.compile_seconds),
        "temp. MiB": lambda r: _text("{:,.1f}", r.temporary_bytes, 2**20),
        "peak MiB": lambda r: _text("{:,.1f}", r.peak_bytes, 2**20),
        "error": lambda r: _text("{:.0e}", max(r.value_error or 0, r.gradient_error or 0) or None),
    }


def _compiled(first: Row) -> Columns:
    """A bound is of the time that the machine's memory and matrix units need, not a measurement."""

    def of(field: str, unit: float = 1) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            number = getattr(row.cost, field, None)
            return "" if number is None else _three_digits(number / unit)

        return cell

    is_head = len(first.shape) == 3
    columns = {
        "/ 6NDV" if is_head else "passes": of("products" if is_head else "passes"),
        "GB": of("bytes", 1e9),
        "temp. MiB": lambda r: _text("{:,.0f}", r.temporary_bytes, 2**20),
        "kernels": lambda r: _text("{:,}", r.cost and r.cost.kernels),
        "sent GB": of("sent", 1e9),
        "in loops": of("sent_in_loop", 1e9),
        "bound ms": lambda r: r.status if r.cost is None else of("seconds", 1e-3)(r),
        f"/ {BASELINE[first.subject]}": lambda r: _text("{:.2f}", r.ratio),
        "floor": lambda r: _text("{:.0%}", r.floor_fraction),
    }
    if first.mesh is None:
        del columns["sent GB"], columns["in loops"]
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
        whose = f"{BASELINE[subject]}'s {time}, the geometric mean"
        lines.append(f"jax_sce, {subject} {dtype}: {mean:.2f} of {whose}")
    for subject, packages in report.missing.items():
        if packages:
            lines.append(f"{subject}: not installed, so not compared: {', '.join(packages)}")
    return [*lines, f"{report.wall_seconds:.0f} s in all"]


def _ms(seconds: float) -> str:
    return _three_digits(1e3 * seconds)


def _three_digits(number: float) -> str:
    """Or all of those before the point."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _text(form: str, number: float | None, unit: float = 1) -> str:
    return "" if number is None else form.format(number / unit if unit != 1 else number)
