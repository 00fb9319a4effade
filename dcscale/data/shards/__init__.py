"""Shards: tars of documents, stored as token arrays or as text, and the manifest that describes them."""
