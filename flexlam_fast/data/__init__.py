"""Frames on disk, the games and videos they come from, and the experts that play them."""
