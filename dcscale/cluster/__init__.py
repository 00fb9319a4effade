"""What keeps a run on many machines safe: exit codes, first errors, hangs. Imports nothing, so that it starts fast."""
