"""What several test files share: tiny models, cases, probes that run in processes of their own."""
