"""The stores that stages train from and write."""
