"""What a shard is: a tar of documents as token arrays or text, next to a manifest that describes it."""
