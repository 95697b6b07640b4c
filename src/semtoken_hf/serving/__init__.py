"""Compressed prompts for inference engines; stays on the developer's machine."""
