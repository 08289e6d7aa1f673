"""What a trained network is good for."""
