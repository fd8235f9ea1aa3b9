"""Pictures of the rows, by `matplotlib`: time and temporary memory of the loss with its gradients.

Both axes are logarithmic, so that a cost in proportion to the size is a straight line of slope one.
What lies below the floor is shaded. What is zero, which has no logarithm, is left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._compare import FLOOR, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, and a marker for each.
_STYLES = {
    "jax_sce": ("#0072b2", "o"),
    "naive": ("#d55e00", "s"),
    "optax": ("#009e73", "D"),
    "tokamax xla": ("#e69f00", "P"),
    "tokamax chunked_xla": ("#56b4e9", "X"),
    "jax-cce": ("#000000", "v"),
    "torch": ("#cc79a7", "^"),
}
_OTHERS = ("0.5", "*")
_BELOW = "below the floor"

Quantity = Callable[[Row], float]


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A picture of each subject but small; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for subject in ("logits", "distributions", "linear", "scaling"):
        own = [
            row
            for row in rows
            if (row.subject, row.pass_name, row.status) == (subject, "value_and_grad", "ok")
        ]
        if own:
            figure = _growth(own) if subject == "scaling" else _comparison(own)
            paths.append(folder / f"{subject}.png")
            figure.savefig(paths[-1])
    return paths


def _comparison(rows: Sequence[Row]) -> "Figure":
    """A column for each dtype, against V; for so many logits each, because N differs too."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure, axes = _grid(len(dtypes))
    for column, dtype in zip(axes.T, dtypes, strict=True):
        own = [row for row in rows if row.dtype == dtype]
        _lines(column[0], own, _classes, lambda row: _milliseconds(row) / _million_logits(row))
        _lines(column[1], own, _classes, lambda row: _mebibytes(row) / _million_logits(row))
        column[0].set_title(dtype)
        column[1].set_xlabel("classes")
    axes[0, 0].set_ylabel("time (ms per million logits)")
    axes[1, 0].set_ylabel("temporary memory\n(MiB per million logits)")
    return _finished(figure, axes, f"{rows[0].subject}: loss and gradient")


def _growth(rows: Sequence[Row]) -> "Figure":
    """Against V, with the N that most rows have, and against N, with the V that most have."""
    figure, axes = _grid(2)
    ((n, _),) = Counter(map(_examples, rows)).most_common(1)
    ((v, _),) = Counter(map(_classes, rows)).most_common(1)
    over_classes = [row for row in rows if _examples(row) == n]
    over_examples = [row for row in rows if _classes(row) == v]
    for column, own, size in zip(
        axes.T, (over_classes, over_examples), (_classes, _examples), strict=True
    ):
        _lines(column[0], own, size, _milliseconds)
        _lines(column[1], own, size, _mebibytes)
    axes[0, 0].set_title(f"{n:,} examples")
    axes[0, 1].set_title(f"{v:,} classes")
    axes[1, 0].set_xlabel("classes")
    axes[1, 1].set_xlabel("examples")
    axes[0, 0].set_ylabel("time (ms)")
    axes[1, 0].set_ylabel("temporary memory (MiB)")
    features = rows[0].shape[1]
    return _finished(figure, axes, f"linear head of {features} features: loss and gradients")


def _examples(row: Row) -> int:
    return row.shape[0]


def _classes(row: Row) -> int:
    return row.shape[-1]


def _million_logits(row: Row) -> float:
    return row.shape[0] * row.shape[-1] / 1e6


def _milliseconds(row: Row) -> float:
    return 1e3 * row.seconds.median if row.seconds else 0.0


def _mebibytes(row: Row) -> float:
    """Not the floor's: it is one of time."""
    return (row.temporary_bytes or 0) / 2**20 if row.peer != FLOOR else 0.0


# -- what all pictures have in common ----------------------------------------------------------------


def _grid(columns: int) -> tuple["Figure", Any]:
    """Time above, memory below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), dpi=150, layout="constrained")
    return figure, figure.subplots(2, columns, sharex="col", sharey="row", squeeze=False)


def _lines(axes: "Axes", rows: Sequence[Row], size: Quantity, cost: Quantity) -> None:
    """A line for each peer, and the floor's region below them."""
    from matplotlib.ticker import NullLocator

    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if cost(row) > 0:
            points.setdefault(row.peer, []).append((size(row), cost(row)))
    axes.set(xscale="log", yscale="log")
    ticks = sorted({size(row) for row in rows})
    left, right = ticks[0] / 1.3, ticks[-1] * 1.3
    if FLOOR in points:
        sizes, costs = zip(*sorted(points.pop(FLOOR)), strict=True)
        costs = (costs[0], *costs, costs[-1])
        axes.fill_between((left, *sizes, right), costs, color="0.85", lw=0, label=_BELOW)
    for name, own in points.items():
        sizes, costs = zip(*sorted(own), strict=True)
        color, marker = _STYLES.get(name, _OTHERS)
        width = 2.5 if name == "jax_sce" else 1.5
        axes.plot(sizes, costs, color=color, marker=marker, lw=width, label=name)
    axes.set_xlim(left, right)
    axes.set_xticks(ticks, [_short(int(tick)) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def _short(size: int) -> str:
    """Thousands, and of powers of two those that are 1024."""
    if size < 1000:
        return str(size)
    return f"{size // 1024}k" if size & (size - 1) == 0 else f"{size / 1000:.0f}k"


def _finished(figure: "Figure", axes: Any, title: str) -> "Figure":
    """With the ticks of each row, the title, and one legend below, the floor the last in it."""
    from matplotlib.ticker import LogLocator

    handles: dict[str, Any] = {}
    for each in axes.flat:
        low, high = each.get_ylim()
        each.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        handles |= dict(zip(*reversed(each.get_legend_handles_labels()), strict=True))
    labels = sorted(handles, key=lambda label: label == _BELOW)
    figure.suptitle(title)
    figure.legend([handles[x] for x in labels], labels, loc="outside lower center", ncols=4)
    return figure
