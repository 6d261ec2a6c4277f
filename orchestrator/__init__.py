"""What runs where: queue, placement, controller, command line."""

PROGRAM = "python -m orchestrator"
"""What a person types; every hint begins with it."""
