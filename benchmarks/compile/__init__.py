"""Every Triton kernel compiled for GPUs that are not here, and what the compiler made of it."""
