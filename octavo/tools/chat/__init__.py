"""octavo chat: talk to a model from the terminal."""
