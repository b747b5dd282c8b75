"""Restoring: stored segments back into the cache."""
