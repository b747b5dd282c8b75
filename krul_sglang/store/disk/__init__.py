"""The disk tier: sealed segments as immutable files, found again after a restart."""
