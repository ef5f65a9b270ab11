"""The server half of the Flower app."""
