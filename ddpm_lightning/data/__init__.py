"""Images on their way to the network: where they come from, and which one goes into which step."""
