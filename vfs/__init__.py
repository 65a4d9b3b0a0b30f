"""The logic of runfs: the tree, where bytes are, what may be dropped, what must be pushed. No FUSE, no trio."""
