"""One OPSD optimizer step end to end, ours and TRL's; see __main__.py."""
