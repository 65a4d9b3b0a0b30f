"""Small languages people type: sizes (`50G`), ages (`30d`) and conditions on records (`status=finished and age>30d`).

Used by the settings (sizes and times in the configuration), the command line (to refuse bad input before anything
starts) and the session (to select records). Nothing here blocks or touches a disk.

    where     = condition (("," | "and") condition)*
    condition = field operator value
    field     = kind | module | label | status | created_by | size | age | config.<path>
    operator  = "=" | "!=" | "<" | "<=" | ">" | ">=" | "~" | "!~"      ("~" compares with a shell pattern)
    value     = 'quoted' | "quoted" | words

`module=foo.*` is a pattern because the value has `*`, `?` or `[` and is not quoted: it becomes the operator `~`.
"""

import fnmatch
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, cast

from vfs.errors import UsageError

Operator = Literal["=", "!=", "<", "<=", ">", ">=", "~", "!~"]
Value = str | int | float | bool | None

TEXT_FIELDS = ("kind", "module", "label", "status", "created_by")
MEASURED_FIELDS = ("size", "age")
FIELDS = (*TEXT_FIELDS, *MEASURED_FIELDS, "config.<path>")
ORDERED = ("<", "<=", ">", ">=")

SIZE_FORM = "write a number with a unit, such as 50G, 500MB or 1.5GiB"
AGE_FORM = "write a number with a unit, such as 30d, 12h, 90m or 45s"
WHERE_FORM = "write for example: status=finished and age>30d"

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(?:([kmgtpe])(i)?)?b?", re.IGNORECASE)
_AGE_PART = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|[smhdwy])", re.IGNORECASE)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0, "y": 365 * 86400.0}
_LARGEST = 2**63 - 1  # what SQLite and off_t can hold

_FIELD = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.\-\[\]]*)\s*")
_OPERATOR = re.compile(r"(!=|<=|>=|==|!~|=|<|>|~)\s*")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_BARE = re.compile(r"(.*?)(?=\s*,|\s+and(?:\s|$)|\s*$)", re.IGNORECASE | re.DOTALL)
_JOIN = re.compile(r"\s*,\s*|\s+and(?:\s+|$)", re.IGNORECASE)
_HIDDEN_OR = re.compile(r"\sor\s+[a-z_][\w.]*\s*[=<>!~]", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes from `50G`, `1.5GiB`, `500 MB` or a plain number of bytes.

    `k M G T P E` (with or without `B`) are powers of 1000, as sizes are printed; `Ki Mi Gi ...` are powers of 1024.
    Raises UsageError, showing the good form.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = _SIZE.fullmatch(str(text).strip())
        if match is None:
            raise UsageError(f"{text!r} is not a size: {SIZE_FORM}")
        number, prefix, binary = match.groups()
        power = " kmgtpe".index(prefix.lower()) if prefix else 0
        size = round(float(number) * (1024 if binary else 1000) ** power)
    if not 0 <= size <= _LARGEST:
        raise UsageError(f"{text!r} is not a size that can be: {SIZE_FORM}")
    return size


def parse_age(text: str | float) -> float:
    """Seconds from `30d`, `12h`, `1d12h`, `500ms`; a number (not a string) is seconds already.

    A string without a unit is refused, since 30 could be seconds or days. Raises UsageError, showing the good form.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if not 0 <= text < float("inf"):
            raise UsageError(f"{text!r} is not an age: {AGE_FORM}")
        return float(text)
    rest = str(text).strip()
    parts = _AGE_PART.findall(rest)
    if not parts or _AGE_PART.sub("", rest).strip():
        raise UsageError(f"{text!r} is not an age: {AGE_FORM}")
    return sum(float(number) * _SECONDS[unit.lower()] for number, unit in parts)


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison. `value` is bytes for `size`, seconds for `age`, text or a config value for the rest."""

    field: str
    operator: Operator
    value: Value

    @property
    def config_path(self) -> str | None:
        """The dotted path inside a record's config, or None when this is about another field."""
        return self.field.removeprefix("config.") if self.field.startswith("config.") else None

    def matches(self, actual: object) -> bool:
        """Whether a record's value fulfils this. None stands for "has none": only `!=` and `!~` are true of it."""
        match self.operator:
            case "=":
                return _same(actual, self.value)
            case "!=":
                return not _same(actual, self.value)
            case "~":
                return _like(actual, str(self.value))
            case "!~":
                return not _like(actual, str(self.value))
        return _ordered(actual, self.operator, self.value)


def parse_where(text: str) -> tuple[Condition, ...]:
    """The conditions in `text`, all of which a record must fulfil. Raises UsageError, pointing at where it stopped."""
    conditions: list[Condition] = []
    position = 0
    while True:
        condition, position = _condition(text, position)
        conditions.append(condition)
        if not text[position:].strip():
            return tuple(conditions)
        join = _JOIN.match(text, position)
        if join is None:
            raise UsageError(f"--where: expected ',' or 'and' at {text[position:].strip()!r}: {WHERE_FORM}")
        position = join.end()


def _condition(text: str, position: int) -> tuple[Condition, int]:
    field = _FIELD.match(text, position)
    if field is None:
        raise UsageError(f"--where: expected a field at {text[position:].strip()!r}: {WHERE_FORM}")
    name = _known_field(field[1])
    operator = _OPERATOR.match(text, field.end())
    if operator is None:
        raise UsageError(f"--where: {name} needs a comparison and a value, such as {_example(name)}")
    raw, quoted, end = _value(text, operator.end())
    if not raw and not quoted:
        raise UsageError(f"--where: {name}{operator[1]} needs a value, such as {_example(name)}")
    sign = "=" if operator[1] == "==" else operator[1]
    return _checked(name, cast(Operator, sign), raw, quoted=quoted), end


def _known_field(name: str) -> str:
    known = (*TEXT_FIELDS, *MEASURED_FIELDS)
    if name in known or (name.startswith("config.") and len(name) > len("config.")):
        return name
    near = get_close_matches(name, (*known, "config."), n=1)
    hint = f"did you mean {near[0].replace('config.', 'config.<path>')}?" if near else f"known: {', '.join(FIELDS)}"
    raise UsageError(f"--where: there is no field {name!r}; {hint}")


def _value(text: str, position: int) -> tuple[str, bool, int]:
    quoted = _QUOTED.match(text, position)
    if quoted is not None:
        return quoted[1] if quoted[1] is not None else quoted[2], True, quoted.end()
    bare = _BARE.match(text, position)
    assert bare is not None  # the pattern matches the empty string
    if bare[1][:1] in ("'", '"'):
        raise UsageError(f"--where: the quote at {bare[1]!r} is not closed")
    if _HIDDEN_OR.search(bare[1]):
        raise UsageError("--where knows only 'and'; for 'or' run the command once for each part")
    return bare[1].strip(), False, bare.end()


def _checked(name: str, operator: Operator, raw: str, *, quoted: bool) -> Condition:
    if name in MEASURED_FIELDS:
        if operator in ("~", "!~"):
            raise UsageError(f"--where: {name} is a quantity; compare it with < or >, such as {_example(name)}")
        return Condition(name, operator, parse_size(raw) if name == "size" else parse_age(raw))
    if name in TEXT_FIELDS and operator in ORDERED:
        raise UsageError(f"--where: {name} has no order; use = or !=, such as {_example(name)}")
    if not quoted and any(sign in raw for sign in "*?[") and operator in ("=", "!="):
        return Condition(name, "~" if operator == "=" else "!~", raw)
    literal = quoted or name in TEXT_FIELDS or operator in ("~", "!~")
    return Condition(name, operator, raw if literal else _config_value(raw))


def _config_value(raw: str) -> Value:
    words: dict[str, Value] = {"true": True, "false": False, "null": None, "none": None}
    if raw.lower() in words:
        return words[raw.lower()]
    for number in (int, float):
        try:
            return number(raw)
        except ValueError:
            continue
    return raw


def _example(name: str) -> str:
    examples = {
        "kind": "kind=Execution",
        "module": "module=study.*",
        "status": "status=finished",
        "label": "label=best",
    }
    examples |= {"size": "size>1G", "age": "age>30d", "created_by": "created_by=ada"}
    return examples.get(name, f"{name}>=0.1")


def _same(actual: object, value: Value) -> bool:
    # In Python True == 1; in a configuration they are different values.
    return isinstance(actual, bool) == isinstance(value, bool) and actual == value


def _like(actual: object, pattern: str) -> bool:
    return isinstance(actual, str) and fnmatch.fnmatchcase(actual, pattern)


def _ordered(actual: object, operator: Operator, value: Value) -> bool:
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (actual, value))
    if not numbers and not (isinstance(actual, str) and isinstance(value, str)):
        return False  # values of unlike kinds have no order
    left, right = cast(float, actual), cast(float, value)
    results = {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}
    return results[operator]
