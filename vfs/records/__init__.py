"""Records on any store, with no mount and no index: machinable's storage verbs.

Public: `Records` (`records.py`) and `fetch`. `retrieve.py` brings a record into a directory, `plain.py` reads one that
another tool uploaded; both are used by import and reindex too. Importing it asks nothing of anybody.
"""

from vfs.records.records import Records, fetch

__all__ = ["Records", "fetch"]
