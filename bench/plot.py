"""The results as one SVG: a panel a scenario, a bar a contender, the range of the repetitions as a line over it."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from bench.results import PRODUCT, Result, Results, median, values
from bench.scenarios import SCENARIOS, Figure, Scenario

PANELS = ("conn64", "rr1p", "down1", "down16", "up1", "up16", "idle", "verify")
COLUMNS = 2
PANEL_WIDTH, BAR_HEIGHT, GAP, HEAD, NAME_WIDTH, VALUE_WIDTH = 470, 16, 4, 44, 130, 90
BAR_WIDTH = PANEL_WIDTH - NAME_WIDTH - VALUE_WIDTH
OWN, REFERENCE, PEER = "#2a7f62", "#b0b0b0", "#7d9ec0"
STYLE = "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}.unit{fill:#666}.range{stroke:#222;stroke-width:1}"


def _colour(name: str) -> str:
    if name.startswith(PRODUCT):
        return OWN
    return REFERENCE if name.startswith("direct") else PEER


def _bar(name: str, results: list[Result], figure: Figure, y: int, scale: float) -> Iterator[str]:
    value = median(results, figure.key) or 0.0
    found = values(results, figure.key)
    middle = y + BAR_HEIGHT // 2
    yield f'<text x="{NAME_WIDTH - 6}" y="{y + 12}" text-anchor="end">{escape(name)}</text>'
    yield f'<rect x="{NAME_WIDTH}" y="{y}" width="{value * scale:.1f}" height="{BAR_HEIGHT}" fill="{_colour(name)}"/>'
    if len(found) > 1:
        low, high = (NAME_WIDTH + bound * scale for bound in (min(found), max(found)))
        yield f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'
    end = NAME_WIDTH + max([value, *found]) * scale
    text = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    yield f'<text x="{end + 5:.1f}" y="{y + 12}">{text}</text>'


def _panel(scenario: Scenario, contenders: dict[str, list[Result]]) -> Iterator[str]:
    figure = scenario.figures[0]
    order = sorted(
        contenders, key=lambda name: median(contenders[name], figure.key) or 0, reverse=figure.higher_is_better
    )
    longest = max((value for results in contenders.values() for value in values(results, figure.key)), default=0) or 1
    better = "more" if figure.higher_is_better else "less"
    heading = f"{scenario.name}: {figure.heading} ({better} is better)"
    yield f'<text class="title" x="0" y="14">{escape(heading)}</text>'
    yield f'<text class="unit" x="0" y="30">{escape(scenario.title.split(":")[0])}</text>'
    for i, name in enumerate(order):
        yield from _bar(name, contenders[name], figure, HEAD + i * (BAR_HEIGHT + GAP), BAR_WIDTH / longest)


def draw(results: Results) -> str:
    """The SVG document; scenarios without results are left out."""
    panels = {name: results.contenders(name) for name in PANELS if results.contenders(name)}
    tallest = max((len(contenders) for contenders in panels.values()), default=0)
    row_height = HEAD + tallest * (BAR_HEIGHT + GAP) + 16
    lines = []
    for i, (name, contenders) in enumerate(panels.items()):
        x, y = 10 + i % COLUMNS * (PANEL_WIDTH + 10), 10 + i // COLUMNS * row_height
        lines += [f'<g transform="translate({x} {y})">', *_panel(SCENARIOS[name], contenders), "</g>"]
    width = COLUMNS * (PANEL_WIDTH + 10) + 10
    height = 10 + -(-len(panels) // COLUMNS) * row_height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><style>{STYLE}</style>'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *lines, "</svg>", ""])
