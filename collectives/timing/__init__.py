"""How it is timed: clocks, statistics, ranks in step."""
