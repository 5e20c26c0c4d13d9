"""Training: the stages, the loop that they share, and the commands that run them."""
