"""What a run starts from: the checkpoint that it resumes, or the weights that a new run begins with."""
