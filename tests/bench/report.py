"""The table, the plot and the kept line of a run of the benchmarks.

Used by `__main__`. The plot needs matplotlib (in the `bench` extra); without it there is only the table.
"""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tests.bench.samples import Samples, Work
from tests.servers import find_program

Growth = dict[tuple[str, str], list[tuple[int, float]]]


def table(samples: Samples, rounds: int) -> str:
    """A Markdown table: medians of every system, and the ratio that counts beside what it is to reach."""
    systems = samples.systems()
    lines = ["| work | unit | " + " | ".join(systems) + " | reached | asked |", "|---" * (len(systems) + 4) + "|"]
    for work in samples.works.values():
        cells = [_number(samples.median(work.name, system)) for system in systems]
        reached, asked = zip(*_targets(samples, work), strict=True) if work.reaches() or work.most else ((), ())
        lines.append(f"| {work.name} | {work.unit} | {' | '.join(cells)} | {'; '.join(reached)} | {'; '.join(asked)} |")
    lines += ["", f"Medians of {rounds} rounds; ratios are medians of the ratios within a round. {conditions()}"]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _targets(samples: Samples, work: Work) -> list[tuple[str, str]]:
    """What was reached, and what was asked for, for each target of a work. A target that was missed is bold."""
    found = []
    for against, asked in work.reaches():
        ratio = samples.ratio(work.name, work.who, against)
        if ratio is not None:
            text = f"{ratio:.2f} of {against}"
            found.append((f"**{text}**" if ratio < (asked or 0) else text, "" if asked is None else f"{asked:.2f}"))
    value = samples.median(work.name, work.who)
    if work.most is not None and value is not None:
        text = _number(value)
        found.append((f"**{text}**" if value > work.most else text, f"at most {work.most:g} {work.unit}"))
    return found or [("", "")]


def conditions() -> str:
    """Date, kernel, versions: what a figure depends on."""
    versions = [f"Python {platform.python_version()}", f"kernel {platform.release()}", f"{os.cpu_count()} cores"]
    for name, argument in (("rclone", "version"), ("juicefs", "--version"), ("weed", "version"), ("s3fs", "--version")):
        try:
            done = subprocess.run([find_program(name), argument], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        versions.append(done.stdout.splitlines()[0].strip() if done.stdout else name)
    return f"{datetime.date.today()}; " + "; ".join(versions)


def keep(path: Path, samples: Samples, **about: Any) -> None:
    """Add the run as one line of JSON, so that a slow-down is seen."""
    values = {f"{work} | {system}": found for (work, system), found in samples.values.items()}
    ratios = {work.name: samples.ratio(work.name, work.who, work.against) for work in _compared(samples)}
    line = {"at": datetime.datetime.now(datetime.UTC).isoformat(), "conditions": conditions(), **about}
    with path.open("a") as file:
        file.write(json.dumps({**line, "values": values, "ratios": ratios}) + "\n")


def _compared(samples: Samples) -> list[Work]:
    return [work for work in samples.works.values() if work.against != work.who]


def slower(path: Path, samples: Samples) -> list[str]:
    """Works whose ratio is less than 0.8 of the median of the kept runs."""
    if not path.exists():
        return []
    kept: dict[str, list[float]] = {}
    for line in path.read_text().splitlines():
        for work, ratio in json.loads(line)["ratios"].items():
            if ratio is not None:
                kept.setdefault(work, []).append(ratio)
    found = []
    for work in _compared(samples):
        now, before = samples.ratio(work.name, work.who, work.against), sorted(kept.get(work.name, []))
        if now is not None and before and now < 0.8 * before[len(before) // 2]:
            found.append(f"{work.name}: {now:.2f} of {work.against}, was {before[len(before) // 2]:.2f}")
    return found


def plot(path: Path, samples: Samples, growth: Growth) -> bool:
    """Bars of runfs and its peers relative to each work's reference, and the growth curves. False: no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(
        1,
        2 if growth else 1,
        squeeze=False,
        figsize=(15, 7),
        gridspec_kw={"width_ratios": [3, 2][: 2 if growth else 1]},
    )
    left, right = both[0][0], both[0][-1]
    works = _compared(samples)
    systems = [system for system in samples.systems() if system not in ("native", "opendal")]
    height = 0.8 / max(len(systems), 1)
    for number, system in enumerate(systems):
        found = [(samples.ratio(work.name, system, work.against) or 0.0) for work in works]
        left.barh([row + number * height for row in range(len(works))], found, height, label=system)
    left.set_yticks(
        [row + 0.4 - height / 2 for row in range(len(works))], [f"{w.name}\n(1 = {w.against})" for w in works]
    )
    left.tick_params(axis="y", labelsize=7)
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xscale("log")
    left.set_xlabel("speed relative to the reference, longer is better")
    left.invert_yaxis()
    left.legend()
    if growth:
        for (over, what), points in growth.items():
            right.plot(
                [count for count, _ in points], [value for _, value in points], marker="o", label=f"{what}, by {over}"
            )
        right.set_xscale("log")
        right.set_yscale("log")
        right.set_xlabel("how many")
        right.set_ylabel("ms")
        right.legend(fontsize=7)
        right.set_title("cost as work grows", fontsize=9)
    figure.suptitle(conditions(), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True
