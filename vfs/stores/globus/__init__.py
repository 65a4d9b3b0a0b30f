"""The `globus` store: a path of a Globus collection. `store.py` has the store and its broker."""
