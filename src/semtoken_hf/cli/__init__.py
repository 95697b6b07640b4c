"""The command `semtoken`: a file for each thing to do with a checkpoint, imported when it is asked for."""
