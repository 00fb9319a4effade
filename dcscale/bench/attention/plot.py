"""A result as a picture: time by SDPA's, and peak memory, over the length. matplotlib is imported when it is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcscale.bench.attention.cases import Row

COLOURS = {
    "dense": "tab:red",
    "dense-compiled": "tab:orange",
    "chunked": "tab:blue",
    "compiled": "tab:cyan",
    "triton": "tab:green",
    "sdpa": "black",
    "flash-attn": "tab:gray",
    "windowed": "tab:purple",
}


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws the cases with the heads of the first: a column for each type and window. Raises ModuleNotFoundError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator

    shape = tuple(result["rows"][0][name] for name in ("heads", "head_dim"))
    rows = [
        row
        for row in result["rows"]
        if row["not_measured"] is None and (row["heads"], row["head_dim"]) == shape and "times_sdpa" in row
    ]
    columns = list(dict.fromkeys((row["dtype"], row["window"]) for row in rows))
    lengths = sorted({row["length"] for row in rows})
    size = (1.6 + 3.4 * max(1, len(columns)), 7.2)
    figure, axes = pyplot.subplots(
        2, max(1, len(columns)), figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    handles = {}
    for (above, below), (dtype, window) in zip(axes.T, columns):
        above.set_title(f"{dtype}, {'no window' if window is None else f'window {window}'}")
        for name in dict.fromkeys(row["implementation"] for row in rows):
            line = [
                row for row in rows if (row["implementation"], row["dtype"], row["window"]) == (name, dtype, window)
            ]
            line.sort(key=lambda row: row["length"])
            if line:
                handles[name] = _lines(above, below, line)
        for axis in (above, below):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.margins(x=0.12)
            axis.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        below.set_xlabel("T")
    axes[0, 0].set_ylabel("forward+backward\nx SDPA without a window")
    axes[1, 0].set_ylabel("peak memory\nabove the inputs, MiB")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
    machine, versions = result["machine"], result["versions"]
    figure.suptitle(
        f"{machine['name']}, H={shape[0]}, D={shape[1]}, torch {versions['torch']}, {result['date'][:10]}", fontsize=11
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lines(above: Any, below: Any, rows: list[Row]) -> Any:
    """An implementation's two lines."""
    lengths = [row["length"] for row in rows]
    style = {"color": COLOURS[rows[0]["kind"]], "marker": "o", "markersize": 4}
    if rows[0]["kind"] == "sdpa":
        style["linestyle"] = {"cudnn": "--", "efficient": ":"}.get(rows[0]["implementation"].split()[1], "-")
    below.plot(lengths, [row["peak_bytes"] / 2**20 for row in rows], **style)
    return above.plot(lengths, [row["times_sdpa"]["forward_backward"] for row in rows], **style)[0]
