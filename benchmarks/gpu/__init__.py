"""What `make gpu` runs: whether every kernel is right on this machine's GPU, and how far from its limits."""
