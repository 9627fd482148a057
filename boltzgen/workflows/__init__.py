"""One file per job that a user can start."""
