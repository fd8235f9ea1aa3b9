"""Pictures of the rows, by `matplotlib`: time and temporary memory of the loss with its gradients.

Measured costs are lines over the size if several sizes were measured, on logarithmic axes, so that a
cost in proportion to the size is a straight line of slope one; costs of zero are left out. A single size
gets bars. Compiled costs are the passes over the logits, and a head's bound against its memory.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._row import FLOOR, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, and a marker for each.
_STYLES = {
    "jax_sce": ("#0072b2", "o"),
    "naive": ("#d55e00", "s"),
    "optax": ("#009e73", "D"),
    "optax float32": ("#f0e442", "d"),
    "tokamax xla": ("#e69f00", "P"),
    "tokamax chunked_xla": ("#56b4e9", "X"),
    "tokamax mosaic_tpu": ("#999933", "p"),
    "jax-cce": ("#000000", "v"),
    "torch": ("#cc79a7", "^"),
    "Liger-Kernel": ("#332288", ">"),
    "cut-cross-entropy": ("#882255", "<"),
}
_OTHERS = ("0.5", "*")

Quantity = Callable[[Row], float]


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A picture of each subject but small; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for subject in ("logits", "softcap", "distributions", "linear", "scaling"):
        own = [
            row
            for row in rows
            if (row.subject, row.pass_name, row.status) == (subject, "value_and_grad", "ok")
            and row.machine is None
        ]
        if own:
            if subject == "scaling":
                figure = _growth(own)
            elif len({row.shape for row in own}) == 1:
                figure = _one_size(own)
            else:
                figure = _comparison(own)
            paths.append(folder / f"{subject}.png")
            figure.savefig(paths[-1])
    compiled = [r for r in rows if r.cost is not None and r.pass_name == "value_and_grad"]
    compiled = [row for row in compiled if row.dtype == compiled[-1].dtype]
    for name, picture, own in (
        ("passes", _passes, [row for row in compiled if row.subject != "linear"]),
        ("head", _head, [row for row in compiled if row.subject == "linear"]),
    ):
        if any(row.peer != FLOOR for row in own):
            paths.append(folder / f"compiled_{name}.png")
            picture(_largest(own)).savefig(paths[-1])
    return paths


def _one_size(rows: Sequence[Row]) -> "Figure":
    """Bars of time and of temporary memory, a row of pictures for each dtype."""
    from matplotlib.figure import Figure

    by_dtype: dict[str, list[Row]] = {}
    for row in rows:
        by_dtype.setdefault(row.dtype, []).append(row)
    most = max(len(own) for own in by_dtype.values())
    size = (8, 1.1 + len(by_dtype) * (0.9 + 0.32 * most))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(len(by_dtype), 2, sharey="row", squeeze=False)
    for (left, right), (dtype, own) in zip(axes, by_dtype.items(), strict=True):
        for row in own:
            if row.peer == FLOOR:
                label = _floor_label(row)
                left.axvline(_milliseconds(row), color="black", ls="--", lw=1.5, label=label)
        peers = [row for row in own if row.peer != FLOOR]
        names = [row.peer for row in peers]
        colors = [_STYLES.get(name, _OTHERS)[0] for name in names]
        for each, cost in ((left, _milliseconds), (right, _mebibytes)):
            bars = each.barh(names, [cost(row) for row in peers], color=colors)
            labels = [f"{cost(row):,.3g}" for row in peers]
            behind = {"fc": "white", "ec": "none", "pad": 0.5}  # of the label, before the floor
            each.bar_label(bars, labels, padding=3, bbox=behind)
            each.margins(x=0.15)
            each.grid(axis="x", alpha=0.3)
            each.set_axisbelow(True)
            each.set_xlim(left=0)
        left.invert_yaxis()
        left.set_title(dtype)
    axes[-1, 0].set_xlabel("time (ms)")
    axes[-1, 1].set_xlabel("temporary memory (MiB)")
    size_text = " x ".join(map(str, rows[0].shape))
    return _with_legend(figure, axes, f"{rows[0].subject} {size_text}: loss and gradients")


def _comparison(rows: Sequence[Row]) -> "Figure":
    """A column for each dtype, against V. Costs are per million logits, because N differs too."""
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
    return _finished(figure, axes, f"{rows[0].subject}: loss and gradients")


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


def _largest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the largest shape of their subject."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.subject] = max(sizes.get(row.subject, 0), math.prod(row.shape))
    return [row for row in rows if math.prod(row.shape) == sizes[row.subject]]


_NAMES = {"logits": "class ids", "softcap": "soft-cap"}


def _passes(rows: Sequence[Row]) -> "Figure":
    """Bars of each peer's passes over the logits, by machine and subject; the floor is a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    machines = list(dict.fromkeys(row.machine for row in rows))
    subjects = list(dict.fromkeys(row.subject for row in rows))
    peers = [x for x in dict.fromkeys(row.peer for row in rows) if x != FLOOR]
    figure = Figure(figsize=(8, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(machines), sharey=True, squeeze=False)
    width = 0.8 / len(peers)
    for each, machine in zip(axes[0], machines, strict=True):
        for row in (row for row in rows if row.machine == machine):
            place, passes = subjects.index(row.subject), row.cost.passes if row.cost else None
            if row.peer == FLOOR:
                each.hlines(passes, place - 0.45, place + 0.45, color="black", lw=1.5, label=FLOOR)
            elif passes is not None:
                left = place - 0.4 + width * peers.index(row.peer)
                color, _ = _STYLES.get(row.peer, _OTHERS)
                each.bar(left, passes, width, align="edge", color=color, label=row.peer)
        each.set_title(machine)
        names = [_NAMES.get(x, x) for x in subjects]
        each.set_xticks(range(len(subjects)), names, fontsize="small")
        each.yaxis.set_major_locator(MaxNLocator(integer=True))
        each.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("passes over the logits")
    shape = " x ".join(map(str, rows[0].shape))
    return _with_legend(figure, axes, f"compiled: loss and gradient, {shape}, {rows[0].dtype}")


def _head(rows: Sequence[Row]) -> "Figure":
    """A point for each peer: the bound of its time over that of 6NDV, against its temporary memory."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    machines = list(dict.fromkeys(row.machine for row in rows))
    figure = Figure(figsize=(8, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(machines), sharey=True, sharex=True, squeeze=False)
    floor = f"{FLOOR}: 6NDV"
    for each, machine in zip(axes[0], machines, strict=True):
        each.axhline(1, color="black", lw=1.5, label=floor)
        for row in (row for row in rows if row.machine == machine):
            if row.peer != FLOOR and row.floor_fraction is not None and row.temporary_bytes:
                color, marker = _STYLES.get(row.peer, _OTHERS)
                x, y = row.temporary_bytes / 2**30, 1 / row.floor_fraction
                each.plot(x, y, marker, color=color, ms=9, label=row.peer)
        each.set(title=machine, xlabel="temporary memory (GiB)", xscale="log")
        each.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        each.xaxis.set_major_formatter("{x:,g}")
        each.xaxis.set_minor_locator(NullLocator())
        each.grid(alpha=0.3)
    axes[0, 0].set_ylabel("bound of the time / floor")
    shape = " x ".join(map(str, rows[0].shape))
    title = f"compiled: head with its gradients, {shape}, {rows[0].dtype}"
    return _with_legend(figure, axes, title)


def _examples(row: Row) -> int:
    return row.shape[0]


def _classes(row: Row) -> int:
    return row.shape[-1]


def _million_logits(row: Row) -> float:
    return row.shape[0] * row.shape[-1] / 1e6


def _milliseconds(row: Row) -> float:
    return 1e3 * row.seconds.median if row.seconds else 0.0


def _mebibytes(row: Row) -> float:
    """0 for the floor, which is one of time."""
    return (row.temporary_bytes or 0) / 2**20 if row.peer != FLOOR else 0.0


def _floor_label(row: Row) -> str:
    least = "matrix products alone" if len(row.shape) == 3 else "negates the logits"
    return f"{FLOOR}: {least}"


# -- shared by all pictures --------------------------------------------------------------------------


def _grid(columns: int) -> tuple["Figure", Any]:
    """Time above, memory below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), dpi=150, layout="constrained")
    return figure, figure.subplots(2, columns, sharex="col", sharey="row", squeeze=False)


def _lines(axes: "Axes", rows: Sequence[Row], size: Quantity, cost: Quantity) -> None:
    """A line for each peer, and a dashed one for the floor."""
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
        axes.plot(sizes, costs, color="black", ls="--", lw=1.5, label=_floor_label(rows[0]))
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
    """In thousands, which are 1024 for a power of two."""
    if size < 1000:
        return str(size)
    return f"{size // 1024}k" if size & (size - 1) == 0 else f"{size / 1000:.0f}k"


def _finished(figure: "Figure", axes: Any, title: str) -> "Figure":
    """The figure with the ticks of each row."""
    from matplotlib.ticker import LogLocator

    for each in axes.flat:
        low, high = each.get_ylim()
        each.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    return _with_legend(figure, axes, title)


def _with_legend(figure: "Figure", axes: Any, title: str) -> "Figure":
    """The figure with its title, and one legend below; the floor comes last."""
    handles: dict[str, Any] = {}
    for each in axes.flat:
        handles |= dict(zip(*reversed(each.get_legend_handles_labels()), strict=True))
    labels = sorted(handles, key=lambda label: label.startswith(FLOOR))
    if not labels:
        return figure
    figure.suptitle(title)
    figure.legend([handles[x] for x in labels], labels, loc="outside lower center", ncols=4)
    return figure
