"""Plain neural networks, free of any physics."""
