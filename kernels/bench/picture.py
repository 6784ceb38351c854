"""Plot of time per token over sequence length."""

from pathlib import Path


def draw(lines: dict[str, list[tuple[int, float]]], path: Path, *, title: str) -> bool:
    """Plot `lines`, {name: [(positions per row, ns per token)]}. Returns False, without a plot, if no line has two
    points or matplotlib is not installed."""
    if not any(len(line) > 1 for line in lines.values()):
        return False
    try:
        from matplotlib.figure import Figure  # not pyplot: it would look for a display
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, line in lines.items():
        lengths, times = zip(*sorted(line), strict=True)
        axes.plot(lengths, times, marker="o", linewidth=2.5 if name == "lightning attention" else 1.2, label=name)
    ticks = sorted({length for line in lines.values() for length, _ in line})
    axes.set(xscale="log", yscale="log", xlabel="positions in a row", ylabel="forward + backward, ns a token")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    return True
