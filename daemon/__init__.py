"""The shell around `vfs`: FUSE handlers, tasks that move bytes, the control socket, the command line."""
