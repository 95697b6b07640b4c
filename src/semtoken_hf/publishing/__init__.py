"""From a checkpoint folder to a repository on the Hub: what goes there, and one commit that takes it there."""
