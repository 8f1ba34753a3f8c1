"""TRL's trainers beside what opsd_kernels.integrations.trl makes of them: time and memory."""
