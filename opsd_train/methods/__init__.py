"""Training methods: what differs between them, nothing else."""
