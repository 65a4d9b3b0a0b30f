"""The `sftp` store: a directory on any machine that SSH reaches. `store.py` has the store and its broker."""
