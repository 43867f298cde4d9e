"""Draws docs/images/run.svg, the README's picture: the last look of the terminal view of a real run.

python docs/picture.py runs/<run>
"""

import argparse
import io
from pathlib import Path

from rich.console import Console

from launch.view import RunView
from orchestrator.ledger import LedgerReader, RunStatus
from orchestrator.tracking import RunInfo

WIDTH = 100
# rich's own frame asks a content network for its font; a picture in a repository should ask nobody.
FRAME = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" font-family="monospace">
<style>{styles} .{unique_id}-matrix {{ font-size: {char_height}px; line-height: {line_height}px; }}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
<rect width="100%" height="100%" rx="8" fill="#1b1b1d"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def draw(run_dir: Path, out: Path) -> None:
    """Replays what the run logged through the view, and saves what it showed at the end."""
    with LedgerReader(run_dir) as ledger:
        run, finished = ledger.run(), ledger.finished()
    assert run is not None
    assert run.ended is not None
    now = run.started
    view = RunView(clock=lambda: now)
    view.start(RunInfo(recipe=run.recipe, seed=run.seed, run_dir=run_dir, iterations=run.iterations))
    for iteration in finished:
        view.stage(iteration.iteration, "promote")
        view.log(iteration.metrics, iteration=iteration.iteration, step=0)
        view.num_pairs = int(iteration.metrics.get("pairs/kept", 0))
        view.total_pairs += view.num_pairs
        now = iteration.finished
    now = run.ended
    view.finish(RunStatus(run.status))
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(view.render(WIDTH))
    out.parent.mkdir(exist_ok=True)
    out.write_text(console.export_svg(code_format=FRAME))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    draw(parser.parse_args().run_dir, Path(__file__).parent / "images" / "run.svg")
