"""What `semtoken doctor` looks at: the installation, the attention of this machine, a checkpoint's folder."""
