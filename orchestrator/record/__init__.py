"""What is on record: events, their log, the run and the nodes as the logs tell them, and how they are read."""
