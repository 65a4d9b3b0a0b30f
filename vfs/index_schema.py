"""The schema of machinable's index, version 11: what its columns mean, how an empty one is made, how one is checked.

Used by `vfs/index.py` only. The index belongs to machinable: we never migrate one, and the statements below give
the same schema as machinable 5.1's `index.migrate` (a test compares them).
"""

SCHEMA_VERSION = 11

# (column, definition, what it holds)
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("record_id", "TEXT PRIMARY KEY", "the uuid; 12 of base62 today, longer in older stores"),
    ("kind", "TEXT NOT NULL", "Interface, Execution, Project, ..."),
    ("module", "TEXT", "the Python module the record came from; never imported by us"),
    ("identity_key", "TEXT NOT NULL", "digest of module and configuration; first part of the directory's path"),
    ("predicate_json", "TEXT NOT NULL", "what tells records of one configuration apart, as canonical JSON"),
    ("predicate_key", "TEXT NOT NULL", "digest of it (for executions a time); second part of the path"),
    ("parent_id", "TEXT REFERENCES 'index' (record_id)", "may name a record that is not here (yet)"),
    ("config_default_json", "TEXT NOT NULL DEFAULT '{}'", "the class's default configuration"),
    ("config_version_json", "TEXT NOT NULL DEFAULT '[]'", "the versions asked for, in order"),
    ("config_update_json", "TEXT NOT NULL DEFAULT '{}'", "what they changed"),
    ("config_resolved_json", "TEXT NOT NULL DEFAULT '{}'", "the configuration that ran; what a search means"),
    ("inherits_json", "TEXT NOT NULL DEFAULT '[]'", "the modules of the base classes"),
    ("context_json", "TEXT NOT NULL DEFAULT '[]'", "the `with` blocks it was made in"),
    ("storage_uri", "TEXT NOT NULL", "the durable home"),
    ("local_uri", "TEXT", "the rewritable working copy; goes before storage_uri; NULL or '' for none"),
    ("storage_id", "TEXT", "the name of the store of storage_uri"),
    ("hidden", "INTEGER NOT NULL DEFAULT 0", "1: left out of listings; known to this index only"),
    ("bytes_missing", "INTEGER NOT NULL DEFAULT 0", "1: machinable found no directory; its find() leaves it out"),
    ("created_at_ns", "INTEGER NOT NULL", "nanoseconds since 1970"),
    ("updated_at_ns", "INTEGER NOT NULL", "nanoseconds since 1970 of the last official write, or of its ingest"),
    ("created_by", "TEXT", "a user name"),
    ("label", "TEXT", "free text"),
    ("extra_json", "TEXT NOT NULL DEFAULT '{}'", "what the kind adds; `_dump` in it is a pickle: never load it"),
    ("private_json", "TEXT NOT NULL DEFAULT '{}'", "the owner's notes; known to this index only"),
)

RELATIONS: tuple[tuple[str, str, str], ...] = (
    ("id", "INTEGER PRIMARY KEY AUTOINCREMENT", "local to this index; not kept by us"),
    ("relation", "TEXT NOT NULL", "the relation's name, such as Interface.Interface.using"),
    ("record_id", "TEXT NOT NULL REFERENCES 'index' (record_id)", "the record it starts from"),
    ("related_id", "TEXT NOT NULL REFERENCES 'index' (record_id)", "the record it leads to; may not be here (yet)"),
    ("priority", "INTEGER NOT NULL DEFAULT 0", "unused by machinable 5.1"),
    ("created_at_ns", "INTEGER NOT NULL", "nanoseconds since 1970, when this index learned of it"),
)

NAMES: tuple[str, ...] = tuple(name for name, _, _ in COLUMNS)
REQUIRED: frozenset[str] = frozenset(
    name for name, kind, _ in COLUMNS if "NOT NULL" in kind and "DEFAULT" not in kind
) | {"record_id"}
JSON_COLUMNS: tuple[str, ...] = tuple(name for name in NAMES if name.endswith("_json"))
INTEGER_COLUMNS: tuple[str, ...] = tuple(name for name, kind, _ in COLUMNS if kind.startswith("INTEGER"))


def _table(name: str, columns: tuple[tuple[str, str, str], ...], *more: str) -> str:
    body = [f"{column} {definition}" for column, definition, _ in columns]
    return f"CREATE TABLE {name} (\n    " + ",\n    ".join([*body, *more]) + "\n)"


STATEMENTS: tuple[str, ...] = (
    _table("'index'", COLUMNS),
    "CREATE INDEX idx_index_module ON 'index'(module)",
    "CREATE INDEX idx_index_parent ON 'index'(parent_id)",
    "CREATE INDEX idx_index_predicate_key ON 'index'(predicate_key)",
    "CREATE INDEX idx_index_identity ON 'index'( parent_id, identity_key, predicate_key )",
    _table("relations", RELATIONS, "UNIQUE (record_id, related_id, relation)"),
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
