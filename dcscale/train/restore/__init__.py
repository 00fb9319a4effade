"""What a run starts from: a checkpoint to resume from, given initial weights, or random weights."""
