"""The sequence model: its layout, its parameters, its cache, and the loop that generates a code block."""
