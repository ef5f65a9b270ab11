"""The client half of the Flower app."""
