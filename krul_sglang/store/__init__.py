"""The store: what holds evicted segments, under one byte budget."""
