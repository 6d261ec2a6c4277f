"""What people type: the commands, and how their answers look."""
