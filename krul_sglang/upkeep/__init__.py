"""What an operator does to a disk tier's directory, also while servers use it."""
