"""Says where a run directory lies, how its files are written there, and which process owns it."""
