"""Earlier versions of records, and transactions on a record.

`kept.py` owns their form in a store, `history.py` what the journal knows of them, `pruning.py` which of them go,
`reverting.py` makes files what a version says, `past.py` shows versions in the mount, `transactions.py` holds pushes
back between begin and commit. Nothing here is done at import.
"""
