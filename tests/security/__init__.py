"""Who may do what: other users of this machine, foreign names, records and stores that want more than to be read."""
