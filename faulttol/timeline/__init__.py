"""What every rank did in every step: recorded beside training, kept small, drawn as a heat map or a timeline."""
