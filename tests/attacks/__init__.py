"""What hostile clients send, through the same path as everyone."""
