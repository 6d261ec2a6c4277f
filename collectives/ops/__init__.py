"""What is sent: operations, transfers, routing of tokens, groups of ranks, exact values."""
