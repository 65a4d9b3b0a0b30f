"""Sizes, ages and conditions, as people type them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfs.errors import UsageError
from vfs.where import Condition, parse_age, parse_size, parse_where


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("50G", 50_000_000_000),
        ("50 GB", 50_000_000_000),
        ("1.5GiB", 1_610_612_736),
        ("64KiB", 65_536),
        ("64k", 64_000),
        ("0", 0),
        ("512", 512),
        ("12b", 12),
        (".5M", 500_000),
        (7, 7),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "1Q", "1GX", "1,5G", "nan", "inf", "1e9", "50 %", "99999999999P", "1ib"]
)
def test_what_is_no_size_is_refused_with_the_good_form(text: str) -> None:
    with pytest.raises(UsageError, match=r"50G, 500MB or 1\.5GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("30d", 2_592_000),
        ("12h", 43_200),
        ("90m", 5_400),
        ("45s", 45),
        ("1d12h", 129_600),
        ("1 w", 604_800),
        ("500ms", 0.5),
        (2.5, 2.5),
    ],
)
def test_ages(text: str | float, age: float) -> None:
    assert parse_age(text) == age


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1x", "1d x", "soon"])
def test_what_is_no_age_is_refused_with_the_good_form(text: str) -> None:
    with pytest.raises(UsageError, match="30d, 12h, 90m or 45s"):
        parse_age(text)


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("kind=Execution", [("kind", "=", "Execution")]),
        ("kind = Execution and age>30d", [("kind", "=", "Execution"), ("age", ">", 2_592_000)]),
        ("size>=1.5GiB,status!=finished", [("size", ">=", 1_610_612_736), ("status", "!=", "finished")]),
        ("module=foo.*", [("module", "~", "foo.*")]),
        ("module!=foo.*", [("module", "!~", "foo.*")]),
        ("module='foo.*'", [("module", "=", "foo.*")]),
        ("label~best*", [("label", "~", "best*")]),
        ("label=two words AND created_by=ada", [("label", "=", "two words"), ("created_by", "=", "ada")]),
        ("label='a, b and c',kind=X", [("label", "=", "a, b and c"), ("kind", "=", "X")]),
        ("label=''", [("label", "=", "")]),
        ("config.lr>=0.1", [("config.lr", ">=", 0.1)]),
        ("config.model.layers==12", [("config.model.layers", "=", 12)]),
        ("config.flag=true, config.name=null", [("config.flag", "=", True), ("config.name", "=", None)]),
        ('config.seed="12"', [("config.seed", "=", "12")]),
        ("label=12", [("label", "=", "12")]),
        ("label=a=b", [("label", "=", "a=b")]),
    ],
)
def test_conditions(text: str, conditions: list[tuple[str, str, object]]) -> None:
    assert [(c.field, c.operator, c.value) for c in parse_where(text)] == conditions


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a field"),
        ("lable=x", "did you mean label"),
        ("kind", "needs a comparison"),
        ("kind=", "needs a value"),
        ("kind>a", "has no order"),
        ("size~1", "is a quantity"),
        ("size>big", "50G"),
        ("age>30", "30d"),
        ("kind=a or kind=b", "only 'and'"),
        ("label='a", "not closed"),
        ("label='a'b=c", "expected ',' or 'and'"),
        ("kind=a and", "expected a field"),
        ("config.=1", "there is no field"),
    ],
)
def test_bad_conditions_say_what_to_write(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_where(text)


@pytest.mark.parametrize(
    ("text", "actual", "matches"),
    [
        ("kind=Execution", "Execution", True),
        ("kind!=Execution", None, True),
        ("module=foo.*", "foo.bar", True),
        ("module=foo.*", "Foo.bar", False),
        ("module=foo.*", None, False),
        ("module!=foo.*", None, True),
        ("config.lr>=0.1", 0.1, True),
        ("config.lr>=0.1", "0.1", False),
        ("config.lr<1", True, False),
        ("config.flag=1", True, False),
        ("config.flag=true", True, True),
        ("config.n=1", 1.0, True),
        ("size>1k", 1001, True),
        ("size<=1k", 1001, False),
        ("config.a<b", "a", True),
    ],
)
def test_matching(text: str, actual: object, matches: bool) -> None:
    (condition,) = parse_where(text)
    assert condition.matches(actual) is matches


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for parse in (parse_where, parse_size, parse_age):
        try:
            result: object = parse(text)
        except UsageError:
            result = "refused"
        assert result is not None


@given(st.text(max_size=30).filter(lambda t: "'" not in t))
def test_a_quoted_value_comes_back_as_it_is(value: str) -> None:
    assert parse_where(f"label='{value}'") == (Condition("label", "=", value),)
