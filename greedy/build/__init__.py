"""Networks and losses from recipes, and recipes of networks given in Python."""
