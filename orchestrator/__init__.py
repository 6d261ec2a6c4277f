"""What runs where: queue, placement, controller, command line."""
