"""The losses inside other people's trainers: transformers, TRL, Liger's surface."""
