"""Training on the developer's machine; nothing here ships inside a checkpoint."""
