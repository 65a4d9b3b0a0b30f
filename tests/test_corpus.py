"""machinable's own conformance corpus, and its own reindex, against ours: every row, status and search."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import apsw
import pytest

from tests.projects import Project
from vfs.format import read_header, run_status
from vfs.index import Find, Index, Sort
from vfs.index_schema import NAMES

# What machinable 5.1.0's generator writes; another number means vectors this test does not know.
ROWS, RELATIONS, STATUSES, SEARCHES = 5, 1, 8, 11
JSON_OF = {
    "predicate": "predicate_json",
    "config_resolved": "config_resolved_json",
    "config_default": "config_default_json",
}

THEIR_REINDEX = """
import sys
from machinable.index import Index
from machinable.utils import walk_markers
with Index({"database": sys.argv[1]}) as index:
    for directory in walk_markers(sys.argv[2]):
        index.ingest_directory(directory)
"""


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(path: Path, sql: str) -> list[tuple[Any, ...]]:
    # apsw, as the index: see `sql` in test_index.py
    connection = apsw.Connection(str(path))
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def rows(path: Path) -> dict[str, dict[str, Any]]:
    found = table(path, f'SELECT {", ".join(NAMES)} FROM "index"')
    return {row[0]: dict(zip(NAMES, row, strict=True)) for row in found}


def edges(path: Path) -> list[tuple[Any, ...]]:
    return sorted(table(path, "SELECT relation, record_id, related_id, priority FROM relations"))


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("conformance") / "corpus"
    python("-m", "machinable.corpus", str(directory), cwd=directory.parent)
    return directory


@pytest.fixture
def corpus(generated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(generated, tmp_path / "corpus"))


def load(corpus: Path, name: str) -> Any:
    return json.loads((corpus / f"{name}.json").read_text())


def ingested(corpus: Path) -> Path:
    path = corpus / "ours.sqlite"
    with Index.open(path, create=True) as index:
        done = index.reindex([corpus / "store"])
    assert len(done.ingested) == ROWS
    assert done.damaged == []
    return path


def test_every_expected_row(corpus: Path) -> None:
    found = rows(ingested(corpus))
    expected = load(corpus, "expected_index")["rows"]
    assert len(expected) == len(found) == ROWS
    for row in expected:
        mine = found[row["record_id"]]
        for name, value in row.items():
            if name == "storage_path":
                assert mine["storage_uri"] == mine["local_uri"] == f"file://{corpus}/store/{value}"
            elif name in JSON_OF:
                assert json.loads(mine[JSON_OF[name]]) == value
            else:
                assert mine[name] == value, name


def test_every_expected_relation(corpus: Path) -> None:
    expected = load(corpus, "expected_index")["relations"]
    assert len(expected) == RELATIONS
    assert edges(ingested(corpus)) == [(e["relation"], e["record_id"], e["related_id"], 0) for e in expected]


def test_headers_of_the_store(corpus: Path) -> None:
    expected = {row["record_id"]: row for row in load(corpus, "expected_index")["rows"]}
    headers = [read_header(path.parent) for path in (corpus / "store").rglob("id.json")]
    assert len(headers) == ROWS
    for header in headers:
        row = expected[header.uuid]
        theirs = (row["kind"], row["identity_key"], row["predicate_key"], row["parent_id"])
        assert (header.kind, header.identity_key, header.predicate_key, header.parent) == theirs


def test_every_status(corpus: Path) -> None:
    tracker = load(corpus, "tracker")
    assert len(tracker["vectors"]) == STATUSES
    for vector in tracker["vectors"]:
        markers = {name: value.encode() for name, value in vector["markers"].items()}
        now = datetime.fromisoformat(vector["now"]).timestamp()
        assert run_status(markers, now, window=tracker["window_seconds"]) == vector["expect"], vector


def as_find(request: dict[str, Any]) -> Find:
    """Their request as ours; a field that we do not have is a TypeError, so none goes unnoticed."""
    values = dict(request)
    if "config" in values:
        config = values.pop("config")
        assert set(config) == {"layer", "filters"}
        values["layer"] = config["layer"]
        values["config"] = [(each["path"], each["op"], each["value"]) for each in config["filters"]]
    if "sort" in values:
        values["sort"] = [Sort(each["by"], descending=each["direction"] == "desc") for each in values["sort"]]
    if "record_id_suffix" in values:
        values["suffix"] = values.pop("record_id_suffix")
    return Find(**values)


def test_every_search(corpus: Path) -> None:
    cases = load(corpus, "behavior")["cases"]
    assert len(cases) == SEARCHES
    with Index.open(ingested(corpus)) as index:
        for case in cases:
            found = index.find(as_find(case["request"]))
            result = {"total": found.total, "record_ids": [record.uuid for record in found.records]}
            assert result == case["expect"], case["note"]


def test_column_for_column_as_their_reindex(corpus: Path) -> None:
    theirs = corpus / "theirs.sqlite"
    python("-c", THEIR_REINDEX, str(theirs), str(corpus / "store"), cwd=corpus)
    ours = ingested(corpus)
    assert rows(ours) == rows(theirs)
    assert edges(ours) == edges(theirs)


def test_column_for_column_on_real_runs(make_project: Callable[..., Project], tmp_path: Path) -> None:
    """Runs with dumps, executions, a Project row and relations, ingested from their directories by both."""
    project = make_project(size=1000)
    theirs, ours = tmp_path / "theirs.sqlite", tmp_path / "ours.sqlite"
    python("-c", THEIR_REINDEX, str(theirs), str(project.path), cwd=tmp_path)
    with Index.open(ours, create=True) as index:
        done = index.reindex([project.path])
    assert done.damaged == []
    assert len(done.ingested) >= 2 * len(project.runs)  # each run has an execution in it
    expected = rows(theirs)
    assert rows(ours) == expected
    assert edges(ours) == edges(theirs)
    # and what the runs themselves had put there, apart from what only a live object gives
    for uuid, row in project.rows().items():
        given = {"updated_at_ns", "extra_json", "private_json"}
        if uuid in expected:
            assert {k: v for k, v in row.items() if k not in given} == {
                k: v for k, v in expected[uuid].items() if k not in given
            }


ODD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"identity_key": "i" * 200}, {}),
    ({"identity_key": " a b/c: é "}, {}),
    ({"identity_key": ""}, {}),
    ({"predicate_key": ""}, {"predicate": {"b": 1.0, "a": [None, "é", 1e16]}}),
    ({"parent": "nobody"}, {"kind": "Gadget"}),
    ({"kind": "Manifest"}, {"kind": "Manifest", "entries": [{"b": 1, "a": 2}]}),
    ({"kind": "Execution"}, {"kind": "Execution", "seed": 5, "nickname": "n", "resources": {"b": 1, "a": 2}}),
    ({"format": None, "kind": 7}, {"config": {}, "version": ["~v", {"a": 1}]}),
    ({}, {"config": {"a": 1}, "version": ["~v"]}),
    ({}, {"config": {"a": 1, "_version_": []}, "version": ["~v"]}),
    ({}, {"config": {"_default_": {"a": 1}, "_update_": {"a": 2}}}),
    ({}, {"config": {"a": float("nan"), "b": float("inf"), "c": 10**30}}),
    ({}, {"created_at_ns": "12", "inherits": ["a", "b"], "context": [["m", []]], "label": "\0\n\U0001f600"}),
    ({}, {"created_at_ns": 7.0, "version": None}),
    ({}, {"created_by": None, "label": "", "module": ""}),
    ({}, {"uuid": "other"}),
    ({}, {"kind": None}),
    ({}, {"config": []}),
    ({}, {"config": {"_default_": None, "a": 1}}),
    ({"predicate_key": "p" * 129}, {}),
    ({"identity_key": None}, {}),
]
THEIRS_ONE_BY_ONE = """
import sys
from machinable.index import Index
from machinable.utils import walk_markers
with Index({"database": sys.argv[1]}) as index:
    for directory in sorted(walk_markers(sys.argv[2])):
        try:
            index.ingest_directory(directory)
        except Exception as error:
            print(directory)
"""


def test_odd_directories_give_their_rows_and_their_refusals(tmp_path: Path) -> None:
    for number, (header, model) in enumerate(ODD):
        directory = tmp_path / "store" / f"{number:02}"
        (directory / "related").mkdir(parents=True)
        uuid = f"uuid{number:02}"
        common = {"uuid": uuid, "kind": "Interface"}
        keys = {"format": 1, "identity_key": "i", "predicate_key": "p", "parent": None}
        given = {"created_at_ns": 3, "created_by": "me"}
        for name, content in (("id.json", {**common, **keys, **header}), ("model.json", {**common, **given, **model})):
            content = {key: value for key, value in content.items() if (key, value) != ("format", None)}
            (directory / name).write_text(json.dumps(content))
        (directory / ".machinable").touch()
        (directory / "updated_at").write_text("2026-01-01T00:00:00.123456+02:00")
        if number % 2:
            edge = {"name": "n", "uuid": uuid, "related_uuid": "x"}
            torn = "\n{" if number % 4 == 1 else "\n\n"
            (directory / "related" / "metadata.jsonl").write_text(json.dumps(edge) + torn)
    theirs, ours = tmp_path / "theirs.sqlite", tmp_path / "ours.sqlite"
    refused = python("-c", THEIRS_ONE_BY_ONE, str(theirs), str(tmp_path / "store"), cwd=tmp_path).split()
    with Index.open(ours, create=True) as index:
        done = index.reindex([tmp_path / "store"])
    expected, found = rows(theirs), rows(ours)
    # `kind: 7` in a header is more than we take; machinable never looks at it
    stricter = {"uuid07"}
    assert set(expected) - set(found) == stricter
    assert found == {uuid: row for uuid, row in expected.items() if uuid not in stricter}
    assert edges(ours) == [edge for edge in edges(theirs) if edge[1] not in stricter]
    assert len(found) >= 13
    assert {path for path, reason in done.damaged if "edges" not in reason} == {
        *refused,
        str(tmp_path / "store" / "07"),
    }


def test_second_reindex_refreshes_and_keeps_what_only_the_index_knows(corpus: Path) -> None:
    path = ingested(corpus)
    connection = apsw.Connection(str(path))
    connection.execute('UPDATE "index" SET hidden = 1, private_json = \'{"note":"mine"}\', label = \'stale\'')
    connection.close()
    before = rows(path)
    with Index.open(path) as index:
        assert len(index.reindex([corpus / "store"]).ingested) == ROWS
    after = rows(path)
    expected = {row["record_id"]: row["label"] for row in load(corpus, "expected_index")["rows"]}
    assert {uuid: row["label"] for uuid, row in after.items()} == expected
    for uuid, row in after.items():
        assert {**row, "label": None} == {**before[uuid], "label": None}


def test_order_does_not_matter(corpus: Path) -> None:
    directories = sorted(path.parent for path in (corpus / "store").rglob("id.json"))
    found = []
    for name, order in (("a", directories), ("b", directories[::-1])):
        with Index.open(corpus / f"{name}.sqlite", create=True) as index:
            assert all(index.ingest(directory) for directory in order)
        found.append(rows(corpus / f"{name}.sqlite"))
    assert found[0] == found[1]
    assert len(found[0]) == ROWS


def test_nothing_is_imported_and_nothing_unpickled(corpus: Path) -> None:
    """A record whose module and dump would leave a file behind if anything ran them."""
    record = next((corpus / "store").glob("*/*/id.json")).parent
    trap = corpus / "trapped"
    (corpus / "evil.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    # the pickle of: os.system("touch ...")
    (record / "dump.p").write_bytes(f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode())
    model = json.loads((record / "model.json").read_text())
    (record / "model.json").write_text(json.dumps({**model, "module": "evil", "_dump": "gASVAAAAAAAAAA=="}))
    code = (
        "import sys; sys.path.insert(0, '.'); from vfs.index import Index; "
        "index = Index.open('x.sqlite', create=True); done = index.reindex(['store']); "
        "print(len(done.ingested), len(index.search(module='evil')), "
        "*{'machinable', 'dill', 'cloudpickle', 'evil'} & set(sys.modules))"
    )
    root = str(Path(__file__).parent.parent)
    out = python("-c", f"import sys; sys.path.insert(0, {root!r}); {code}", cwd=corpus)
    assert out.split() == [str(ROWS), "1"]
    assert not trap.exists()
