"""What the ranks of a measurement run: sweeps, faults, expert traffic."""
