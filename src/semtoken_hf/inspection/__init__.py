"""Looking at what a checkpoint merges in a text, without its language model."""
