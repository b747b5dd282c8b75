"""Attention that a conversation's own queries showed: what of its cache they looked at."""
