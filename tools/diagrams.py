"""Draws figures of README and the site, two diagrams and a plot of measurements: `python -m tools.diagrams`."""

import argparse
import html
import json
import pathlib

INK, GREY, WHITE = "#1f2937", "#6b7280", "#ffffff"
HISTORY, OBSERVED, WINDOW = "#f59e0b", "#10b981", "#3b82f6"
PALE = {HISTORY: "#fef3c7", OBSERVED: "#d1fae5", WINDOW: "#dbeafe"}


class Drawing:
    """An SVG image to which shapes are added."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img"><title>{html.escape(title)}</title>',
            f'<rect width="{width}" height="{height}" fill="{WHITE}"/>',
        ]
        for name, colour in (("grey", GREY), ("history", HISTORY), ("observed", OBSERVED), ("window", WINDOW)):
            self.parts.append(
                f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
                f'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{colour}"/></marker>'
            )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 15,
        colour: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """Draws words at a point."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
            f"{html.escape(words)}</text>"
        )

    def strip(self, x: float, y: float, cells: int, colour: str, filled: int | None = None, cell: int = 18) -> None:
        """Draws the rows of a stream as cells; only the first `filled` rows of a window exist yet."""
        for i in range(cells):
            there = filled is None or i < filled
            fill, dashes = (PALE[colour], "") if there else (WHITE, ' stroke-dasharray="2 2"')
            self.parts.append(
                f'<rect x="{x + i * cell}" y="{y}" width="{cell}" height="24" fill="{fill}" stroke="{colour}" '
                f'stroke-width="1.5"{dashes}/>'
            )

    def arrow(self, path: str, kind: str, width: float = 2) -> None:
        """Draws a path with a head; grey arrows show what rows become, coloured ones what attention reads."""
        colour = {"grey": GREY, "history": HISTORY, "observed": OBSERVED, "window": WINDOW}[kind]
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" marker-end="url(#{kind})"/>'
        )

    def band(self, y: float, height: float, width: float, name: str, note: str) -> None:
        """Draws a layer as a shaded band with its name."""
        self.parts.append(f'<rect x="10" y="{y}" width="{width}" height="{height}" rx="8" fill="#f3f4f6"/>')
        self.text(24, y + height / 2 - 2, name, 17, bold=True)
        self.text(24, y + height / 2 + 17, note, 13, GREY)

    def save(self, path: pathlib.Path) -> None:
        """Writes the file."""
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n")


def architecture() -> Drawing:
    """Draws one block: three streams through its layers."""
    image = Drawing(960, 610, "The streams C, z and x through one block of TLinFormer")
    c, z, x = 180, 466, 686  # left ends of the streams
    tops = (72, 212, 352, 492)
    image.text(c, 26, "C: the history", 17, "#b45309", bold=True)
    image.text(c, 46, "all tokens before the window", 13, GREY)
    image.text(z, 26, "z: its summary", 17, "#047857", bold=True)
    image.text(z, 46, "at most W_oh rows", 13, GREY)
    image.text(x, 26, "x: the generation window", 17, "#1d4ed8", bold=True)
    image.text(x, 46, "up to W_og tokens", 13, GREY)
    for top, name, note in zip(tops, ("compress", "hidden", "restore"), ("first layer", "H layers", "last layer")):
        image.band(top + 34, 96, 940, name, note)
    for top in tops:
        image.strip(x, top, 6, WINDOW)
    image.strip(c, tops[0], 12, HISTORY)
    image.strip(z, tops[1], 5, OBSERVED)
    image.strip(z, tops[2], 5, OBSERVED)
    image.strip(c, tops[3], 12, HISTORY)
    centre_z, centre_x, centre_c = z + 45, x + 54, c + 60
    # What rows become: the residual path with the feed-forward.
    for top in tops[:3]:
        image.arrow(f"M{centre_x} {top + 26} V{top + 136}", "grey")
        image.text(centre_x + 12, top + 88, "+ causal attention", 13, "#1d4ed8")
        image.text(centre_x + 12, top + 106, "to x itself", 13, "#1d4ed8")
    image.arrow(f"M{c + 190} {tops[0] + 26} C{c + 190} {tops[0] + 90} {centre_z - 20} {tops[0] + 60} "
                f"{centre_z - 20} {tops[1] - 4}", "grey")  # fmt: skip
    image.arrow(f"M{centre_z} {tops[1] + 26} V{tops[2] - 4}", "grey")
    image.arrow(f"M{centre_c} {tops[0] + 26} V{tops[3] - 4}", "grey")
    image.text(c + 128, tops[0] + 108, "the last W_oh rows", 13, GREY)
    # What attention reads.
    image.arrow(f"M{c + 214} {tops[0] + 14} C{z + 40} {tops[0] + 14} {centre_z + 10} {tops[0] + 60} "
                f"{centre_z + 10} {tops[1] - 4}", "history", 3)  # fmt: skip
    image.arrow(f"M{c + 214} {tops[0] + 8} C{x - 60} {tops[0] + 8} {x + 20} {tops[0] + 60} {x + 20} {tops[1] - 4}",
                "history", 3)  # fmt: skip
    for top, bottom in ((tops[1], tops[2]), (tops[2], tops[3])):
        image.arrow(
            f"M{z + 90} {top + 12} C{x - 20} {top + 12} {x + 20} {top + 50} {x + 20} {bottom - 4}", "observed", 3
        )
    image.arrow(f"M{z + 70} {tops[1] + 26} C{z + 120} {tops[1] + 70} {z + 100} {tops[1] + 100} {z + 70} {tops[2] - 4}",
                "observed", 3)  # fmt: skip
    image.arrow(f"M{z} {tops[2] + 12} C{c + 190} {tops[2] + 12} {c + 150} {tops[2] + 60} {c + 150} {tops[3] - 4}",
                "observed", 3)  # fmt: skip
    image.text(c, tops[3] + 44, "C of the next block", 14)
    image.text(x, tops[3] + 44, "x of the next block, or the logits", 14)
    # Legend.
    y = 578
    image.arrow(f"M20 {y - 5} h36", "grey")
    image.text(64, y, "rows go on", 14)
    image.arrow(f"M160 {y - 5} h36", "history", 3)
    image.arrow(f"M200 {y - 5} h36", "observed", 3)
    image.text(244, y, "rows are read by attention: their keys and values are cached, and stay the same", 14)
    image.text(
        244, y + 19, "until the window is full and slides; per token only x's own cache grows, by one row a layer", 14
    )
    return image


def caching() -> Drawing:
    """Draws what a token inside the window and a slide do with the cache."""
    image = Drawing(960, 500, "The cache at a hit and at a slide")
    c, z, x, cell = 150, 480, 690, 18

    def labels(y: float) -> None:
        image.text(c, y, "history: keys and values", 14, "#b45309")
        image.text(z, y, "summary: keys and values", 14, "#047857")
        image.text(x, y, "window: keys and values", 14, "#1d4ed8")

    image.text(20, 30, "Hit: a token inside the window", 18, bold=True)
    labels(58)
    image.text(20, 86, "before", 15)
    image.strip(c, 70, 12, HISTORY)
    image.strip(z, 70, 4, OBSERVED)
    image.strip(x, 70, 6, WINDOW, 3)
    image.text(20, 166, "after", 15)
    image.strip(c, 150, 12, HISTORY)
    image.strip(z, 150, 4, OBSERVED)
    image.strip(x, 150, 6, WINDOW, 4)
    image.arrow(f"M{x + 3.5 * cell} 98 V146", "window", 3)
    image.text(x + 3.5 * cell + 10, 126, "one row is written", 14)
    image.text(c, 126, "read, not changed", 14, GREY)
    image.text(z, 126, "read, not changed", 14, GREY)
    image.parts.append('<line x1="10" y1="204" x2="950" y2="204" stroke="#e5e7eb" stroke-width="2"/>')
    image.text(20, 238, "Slide: the window is full, and the next token opens a new one", 18, bold=True)
    labels(266)
    image.text(20, 294, "before", 15)
    image.strip(c, 278, 12, HISTORY)
    image.strip(z, 278, 4, OBSERVED)
    image.strip(x, 278, 6, WINDOW, 6)
    image.text(20, 414, "after", 15)
    image.strip(c, 398, 18, HISTORY, cell=cell)
    image.strip(z + 18, 398, 4, OBSERVED)
    image.strip(x, 398, 6, WINDOW, 0)
    image.arrow(f"M{x + 54} 306 C{x + 54} 350 {c + 270} 330 {c + 270} 394", "history", 3)
    image.text(x + 20, 352, "its tokens join the history", 14)
    image.arrow(f"M{c + 310} 428 C{c + 310} 452 {z + 54} 452 {z + 54} 428", "observed", 3)
    image.text(z + 70, 456, "the summary is made again, of the last W_oh rows", 14)
    image.text(20, 474, "First block: old rows stay as they are, the window's are appended.", 14, GREY)
    image.text(
        20, 493, "Later blocks: all rows are restored again from the new summary, once for W_og tokens.", 14, GREY
    )
    return image


def plot_token_cost(measured: pathlib.Path, out: pathlib.Path) -> None:
    """Plots time and cache of a token by the length of the text, from a file of `benchmarks.inference`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in json.loads(measured.read_text())["rows"] if row["batch"] == 1 and row["length"] <= 10**6]
    figure, (times, caches) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for architecture, name, colour in (("transformer", "Transformer", GREY), ("tlinformer", "TLinFormer", WINDOW)):
        own = [row for row in rows if row["architecture"] == architecture]
        lengths = [row["length"] for row in own]
        means = [1e3 * row["windows"]["seconds"] / row["windows"]["tokens"] for row in own]
        times.loglog(lengths, means, "o-", color=colour, label=name)
        caches.loglog(lengths, [row["cache_bytes"] / 1e9 for row in own], "o-", color=colour, label=name)
        if architecture == "tlinformer":
            inside = [1e3 * row["sustained"]["seconds"] for row in own]
            times.loglog(lengths, inside, "o--", color=colour, label="TLinFormer, inside a window")
    times.set(title="Time of a token, slides included", xlabel="tokens before it", ylabel="ms")
    caches.set(title="Cache of one text", xlabel="tokens", ylabel="GB")
    ticks = {times: (0.2, 0.5, 1, 2, 5), caches: (0.01, 0.1, 1, 10)}
    for axes in (times, caches):
        axes.yaxis.set_minor_formatter("")
        axes.set_yticks(ticks[axes], [f"{tick:g}" for tick in ticks[axes]])
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(frameon=False)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/figures"))
    folder = parser.parse_args().out
    architecture().save(folder / "architecture.svg")
    caching().save(folder / "caching.svg")
    plot_token_cost(folder.parent / "measurements" / "inference_h100_baseline.json", folder / "token_cost.png")


if __name__ == "__main__":
    main()
