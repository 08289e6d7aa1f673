"""What every room needs and nothing else knows about."""
