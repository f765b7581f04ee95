"""Evidence: what merging cost, measured on the files that a user will load."""
