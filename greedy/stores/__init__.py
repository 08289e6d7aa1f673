"""What a stage trains from, and what it writes."""
