"""What calibration learns about a model, its file, and its fingerprint."""
