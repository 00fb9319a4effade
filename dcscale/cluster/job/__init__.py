"""SLURM jobs: submitting them, and what SLURM says of them. Imports nothing, so that it starts fast."""
