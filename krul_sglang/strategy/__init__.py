"""Strategies: how one conversation's segments are to be compressed, and who chooses it."""
