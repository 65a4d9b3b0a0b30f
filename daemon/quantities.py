"""Quantities as people read them: sizes, rates, times, counts; and text that cannot disturb a terminal.

Used by the rendering. Pure functions. Sizes are decimal (1 GB is 10^9 bytes), as `--where size>1G` takes them.
"""

import math
import time
import unicodedata
from datetime import datetime

_PREFIXES = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def size(count: float | None) -> str:
    """Bytes: 0 B, 512 B, 1.5 kB, 12 MB, 212.4 GB."""
    if count is None:
        return "?"
    value, prefix = float(count), 0
    # 999.95 would be printed as 1000.0: it belongs to the next prefix.
    while abs(value) >= (999.5 if prefix < 3 else 999.95) and prefix < len(_PREFIXES) - 1:
        value, prefix = value / 1000, prefix + 1
    if prefix == 0:
        return f"{value:.0f} B"
    # From GB on one decimal always matters; 1.5 MB and 12 MB are exact enough.
    return f"{value:.1f} {_PREFIXES[prefix]}" if prefix >= 3 or value < 9.95 else f"{value:.0f} {_PREFIXES[prefix]}"


def rate(bytes_per_s: float | None) -> str:
    return f"{size(bytes_per_s)}/s" if bytes_per_s else ""


def count(number: int, noun: str = "", plural: str = "") -> str:
    """1,284 records; 1 record."""
    text = f"{number:,}"
    return text if not noun else f"{text} {noun if number == 1 else plural or noun + 's'}"


def clock(seconds: float | None) -> str:
    """What is left of a transfer: 0:06, 12:30, 1:02:03."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    whole = max(0, math.ceil(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def duration(seconds: float) -> str:
    """11 s, 4 min, 2 h, 3 d: one unit, as people say it."""
    for limit, length, unit in ((120, 1, "s"), (7200, 60, "min"), (2 * 86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:,.0f} d"


def moment(value: object) -> float | None:
    """Seconds since the epoch from a number or an ISO 8601 text; None when there is none."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        # A number this large is in nanoseconds: as seconds it would lie 30,000 years ahead.
        return value / 1e9 if value > 1e12 else float(value)
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except ValueError:
        return None


def ago(value: object, now: float | None = None) -> str:
    """`2 h ago` for a moment; empty when there is none."""
    at = moment(value)
    if at is None:
        return ""
    passed = (time.time() if now is None else now) - at
    return f"{duration(passed)} ago" if passed >= 1 else "just now"


def date(value: object) -> str:
    """2026-03-01 14:05, local time."""
    at = moment(value)
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M") if at is not None else ""


def plain(text: object) -> str:
    """Text for a terminal or a log: what could move the cursor or hide something is written out."""
    return "".join(
        c if c == " " or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else _escaped(c)
        for c in str(text)
    )


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
