"""`runfs records` and `runfs import` as they are typed: text, JSON, exit codes, and what each refusal says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.making import FILES, NESTED, UUID, contents, write_record
from vfs.index import Index

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def made(tmp_path: Path) -> Path:
    directory = tmp_path / "made" / "storage" / "i" / UUID
    write_record(directory, UUID, FILES)
    write_record(directory / "x" / "run1", NESTED, {b"output.log": b"said\n"}, parent=UUID)
    return directory


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/lab"


def runfs(place: Path, *arguments: object, exit_code: int = 0) -> str:
    """What a command says, on stdout when it worked, else on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "daemon.cli", *map(str, arguments)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == exit_code, (done.returncode, done.stdout, done.stderr)
    assert "unexpected" not in done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if done.stdout else done.stderr


def test_in_and_out(made: Path, url: str, tmp_path: Path) -> None:
    """No project and no index anywhere near."""
    store = ("--store", url)
    assert runfs(tmp_path, "records", "commit", made, *store, "--dry-run") == f"{UUID}: would be committed\n"
    assert not (tmp_path / "lab" / UUID).exists()
    said = runfs(tmp_path, "records", "commit", made, made / "x" / "run1", *store)
    assert said.startswith(f"{UUID}: committed to lab: ")
    assert len(said.splitlines()) == 1, "a record is committed once"
    assert runfs(tmp_path, "records", "commit", made, *store) == f"{UUID}: committed to lab: 0 files, 0 B\n"
    assert runfs(tmp_path, "records", "contains", NESTED, *store) == f"{NESTED}: yes\n"
    assert runfs(tmp_path, "records", "search", "--like", made, *store).split() == [NESTED, UUID]
    (walked,) = json.loads(runfs(tmp_path, "records", "walk", *store, "--json"))["records"]
    assert (walked["uuid"], walked["nested"], walked["uri"]) == (UUID, [NESTED], f"{url}/{UUID}")
    runfs(tmp_path, "records", "retrieve", UUID, "back", *store, "--dry-run")
    assert not (tmp_path / "back").exists()
    assert runfs(tmp_path, "records", "retrieve", UUID, "back", *store) == f"{tmp_path}/back: {UUID} from lab\n"
    assert contents(tmp_path / "back") == contents(made)
    assert runfs(tmp_path, "records", "download", UUID, "down", *store) == f"down/{UUID}: {UUID}\n"
    runfs(tmp_path, "records", "delete", UUID, *store, "--dry-run")
    assert runfs(tmp_path, "records", "contains", UUID, *store) == f"{UUID}: yes\n"
    assert runfs(tmp_path, "records", "delete", UUID, *store) == f"{UUID}: deleted from the stores\n"
    assert runfs(tmp_path, "records", "walk", *store) == "no records\n"


@pytest.mark.parametrize("point", ["retrieve.made", "retrieve.renamed"])
def test_killed_while_retrieving(
    made: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Nobody finds half a record: it has its markers when all of it is there. The next call finishes it."""
    runfs(tmp_path, "records", "commit", made, "--store", url)
    monkeypatch.setenv("RUNFS_FAULT", f"{point}=kill")
    runfs(tmp_path, "records", "retrieve", UUID, "in/back", "--store", url, exit_code=-9)
    monkeypatch.delenv("RUNFS_FAULT")
    assert os.listdir(tmp_path / "in"), "it was killed in the middle"
    assert list((tmp_path / "in").rglob(".machinable")) == []
    runfs(tmp_path, "records", "retrieve", UUID, "in/back", "--store", url)
    assert contents(tmp_path / "in" / "back") == contents(made)


def test_refusals(made: Path, url: str, tmp_path: Path) -> None:
    store = ("--store", url)
    assert "no store is configured: name one with --store URL" in runfs(tmp_path, "records", "walk", exit_code=2)
    assert "in none of the stores" in runfs(tmp_path, "records", "contains", UUID, *store, exit_code=1)
    assert "in none of the stores" in runfs(tmp_path, "records", "retrieve", UUID, "x", *store, exit_code=1)
    assert "is no uuid of a record" in runfs(tmp_path, "records", "delete", "../x", *store, exit_code=2)
    assert "has no id.json" in runfs(tmp_path, "records", "commit", tmp_path, *store, exit_code=1)
    assert "which records? Give --identity-key" in runfs(tmp_path, "records", "search", *store, exit_code=2)
    runfs(tmp_path, "records", "commit", made, *store)
    (made / "metrics.json").write_text("changed")
    said = runfs(tmp_path, "records", "retrieve", UUID, made, *store, exit_code=1)
    assert "'metrics.json' is not what the store holds, and was left alone" in said
    (tmp_path / "lab" / ".runfs" / UUID / "manifest.json").chmod(0o600)
    (tmp_path / "lab" / ".runfs" / UUID / "manifest.json").write_text("{")
    assert "the manifest is not JSON" in runfs(tmp_path, "records", "retrieve", UUID, "x", *store, exit_code=1)
    assert "manifest.json: the manifest is not JSON" in runfs(tmp_path, "records", "walk", *store, exit_code=1)


def test_a_configured_store(made: Path, url: str, tmp_path: Path) -> None:
    (tmp_path / "config" / "runfs").mkdir(parents=True)
    (tmp_path / "config" / "runfs" / "config.toml").write_text(f'[stores.attic]\nurl = "{url}"\n')
    assert "committed to attic: " in runfs(tmp_path, "records", "commit", made)
    assert runfs(tmp_path, "records", "where", UUID, "--store", "attic").split() == ["attic", url, f"{url}/{UUID}"]


def test_import_of_addresses(made: Path, tmp_path: Path) -> None:
    """Relative paths, the pin that is shown, and the second time."""
    project = tmp_path / "project"
    (project / "storage").mkdir(parents=True)
    Index.open(project / ".machinable.sqlite", create=True).close()
    source = os.path.relpath(made, project)
    planned = runfs(project, "import", f"link+{source}", "--dry-run").splitlines()
    assert planned[0] == f"1 record would be imported; used where it would be, {made}, and pinned"
    first, pinned = runfs(project, "import", f"link+{source}").splitlines()
    assert first == f"1 record imported; used where it is, {made}, and pinned"
    assert pinned.startswith("pinned reference: blake3=")
    again, shown = runfs(project, "import", f"link+{source}").splitlines()
    assert again.startswith("brought already (20")
    assert again.endswith(f": {UUID}")
    assert shown == pinned
    assert pinned.split("blake3=")[1][:8] in runfs(project, "receipts")
    for bad, why in [
        ("git+here", "git+ is no kind of address; there are url+URL, file+PATH and link+PATH"),
        ("url+https://host/x.tar#sha256=1", "a pin is #sha256= and 64 hexadecimal digits"),
        ("file+nowhere.tgz", "there is no such file"),
        ("link+nowhere", "there is no such directory"),
    ]:
        assert why in runfs(project, "import", bad, exit_code=2)


def test_looking_makes_no_store(tmp_path: Path) -> None:
    """A mistyped directory is no store."""
    mistyped = tmp_path / "lbo"
    said = runfs(tmp_path, "records", "walk", "--store", mistyped.as_uri(), exit_code=2)
    assert "there is no such directory" in said
    assert not mistyped.exists()
