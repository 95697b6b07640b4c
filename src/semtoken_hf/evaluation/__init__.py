"""Measuring what compression costs; nothing here ships inside a checkpoint."""
