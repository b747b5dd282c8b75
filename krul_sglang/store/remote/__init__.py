"""The remote tier: sealed segments in a Redis or Valkey server that several machines share."""
