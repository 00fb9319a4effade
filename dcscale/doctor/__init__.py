"""What may be wrong with machines, disks, links, shards and settings before a run: see README.md."""
